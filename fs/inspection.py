"""`info`: what a mount knows of one inode, its key, extents, blobs, and the sites that hold them."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import Any

from apollofs.fs.assembly import Assembly
from apollofs.fs.blobs import site_of, spans
from apollofs.fs.user_error import UserError
from apollofs.metadata.copies import Copies
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.records import Extent, Inode

EXTENTS_SHOWN_MAX = 10_000
OBJECTS_SHOWN_MAX = 64
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


async def inspect_inode(assembly: Assembly, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Answer `info`: `ino`, and where it was found: `parent` (its inode) and `name` (hexadecimal).

    Three requests to the store, and one more for each further hundred blobs. Raises UserError where the inode has no
    name any more.
    """
    try:
        ino, parent, name = int(request["ino"]), int(request["parent"]), bytes.fromhex(request["name"])
    except (KeyError, TypeError, ValueError) as exc:
        raise UserError("the request does not say which inode is meant") from exc
    try:
        body = await assembly.volume.read_body(ino)
    except StaleInode as exc:
        raise UserError("it has no name any more: only processes that had it open still see it") from exc
    sites = {site.id: site.name for site in await assembly.volume.sites()}
    inode = body.inode
    extents = inode.extents[:EXTENTS_SHOWN_MAX]
    copies = await assembly.volume.placement.replicas.read({extent.blob for extent in extents})
    block_bytes = assembly.volume.superblock.block_bytes
    return {
        "ino": inode.ino,
        "type": _TYPES.get(stat.S_IFMT(inode.mode), "unknown"),
        "mode": f"{stat.S_IMODE(inode.mode):04o}",
        "nlink": inode.nlink,
        "uid": inode.uid,
        "gid": inode.gid,
        "size_bytes": inode.size_bytes,
        "allocated_bytes": inode.allocated_bytes,
        "atime_ns": inode.atime_ns,
        "mtime_ns": inode.mtime_ns,
        "ctime_ns": inode.ctime_ns,
        "btime_ns": inode.btime_ns,
        "key": key_text(Keys(assembly.volume.superblock.name), inode, parent, name),
        "revision": inode.revision,
        "body": _body_kind(inode),
        "body_version": inode.body_version,
        "xattrs": inode.xattrs,
        "extent_count": len(inode.extents),
        "extents": [_extent_facts(one, copies[one.blob], sites, block_bytes) for one in extents],
    }


def key_text(keys: Keys, inode: Inode, parent: int, name: bytes) -> str:
    """The key that holds the record, integers in hexadecimal: that of the name, or of the number."""
    table = f"apollofs/{keys.volume}"
    if inode.is_dir or inode.nlink > 1 or not parent:
        return f"{table}/i/{inode.ino:016x}"
    return f"{table}/d/{parent:016x}/{name_text(name)}"


def _body_kind(inode: Inode) -> str:
    if not inode.is_file:
        return "none"
    if inode.is_inline:
        return f"inline ({inode.inline_bytes} bytes in etcd)"
    return "extents" if inode.extents else "empty"


def _extent_facts(extent: Extent, copies: Copies, sites: Mapping[int, str], block_bytes: int) -> dict[str, Any]:
    """`sites`: that of the mount which wrote it, and those that have complete copies."""
    home = site_of(extent.blob)
    holders = [home, *(site for site in copies.complete if site != home)]
    blocks = [
        one.block for one in spans(extent.blob, extent.blob_length, extent.blob_offset, extent.length, block_bytes)
    ]
    names = [block.name for block in blocks]
    return {
        "offset": extent.offset,
        "length": extent.length,
        "blob": f"{extent.blob:016x}",
        "blob_offset": extent.blob_offset,
        "blob_length": extent.blob_length,
        "sites": [sites.get(site, f"site {site}, which was removed") for site in holders],
        "object_count": len(names),
        "objects": names[:OBJECTS_SHOWN_MAX],
    }
