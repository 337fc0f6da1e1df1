"""Making a volume, its sites, and who has it mounted: what an administrator does, without a mount."""

from __future__ import annotations

import stat
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

from apollofs.metadata import codec, journal, retired_sites
from apollofs.metadata.changes.archive_index import has_segments_at
from apollofs.metadata.errors import (
    AlreadyFormatted,
    InvalidArgument,
    NotFormatted,
    OutcomeUnknown,
    QuotaExceeded,
    SiteInUse,
    UnknownSite,
)
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.policy import decode_policy, read_policies
from apollofs.metadata.records import ROOT_INO, Inode, MountRecord, SiteRecord, Superblock
from apollofs.metadata.replicas import forget_site
from apollofs.metadata.store import Compare, Delete, KeyValue, Put, Range, Relation, Store, Target, prefix_end

SITE_ID_MAX = 255
PAGE_KEYS = 1000
BLOCK_BYTES_DEFAULT = 8 << 20
INLINE_BYTES_DEFAULT = 8192
INLINE_BYTES_MAX = 1 << 20


async def format_volume(
    store: Store,
    volume: str,
    *,
    site_name: str,
    site_store: tuple[tuple[str, str], ...],
    block_bytes: int = BLOCK_BYTES_DEFAULT,
    inline_bytes_max: int = INLINE_BYTES_DEFAULT,
    uid: int = 0,
    gid: int = 0,
    mode: int = 0o755,
) -> Superblock:
    """Make a volume with an empty root directory and one site. One transaction.

    Raises AlreadyFormatted, InvalidArgument, StoreError.
    """
    keys = Keys(volume)
    check_sizes(block_bytes, inline_bytes_max)
    check_site_name(site_name)
    now_ns = time.time_ns()
    superblock = Superblock(str(uuid.uuid4()), volume, block_bytes, inline_bytes_max, (), now_ns)
    root = Inode(
        ROOT_INO, stat.S_IFDIR | stat.S_IMODE(mode), 2, uid, gid, 0, now_ns, now_ns, now_ns, now_ns, parent=ROOT_INO
    )
    puts = (
        Put(keys.superblock, codec.encode_superblock(superblock)),
        Put(keys.site(site_name), codec.encode_site(SiteRecord(1, site_name, site_store))),
        Put(keys.inode(ROOT_INO), codec.encode_inode(root)),
        Put(keys.times(ROOT_INO), codec.encode_times(codec.Times(now_ns, now_ns))),
        Put(keys.log_beginning, journal.encode(_beginning(root, now_ns))),
    )
    compares = [Compare(key, Target.VERSION, Relation.EQUAL, 0) for key in (keys.superblock, keys.condemned)]
    try:
        made = (await store.txn(compares, puts)).succeeded
    except OutcomeUnknown:
        # the uuid tells whether it was this request that made it
        found = await store.range(Range(keys.superblock))
        made = bool(found.kvs) and codec.decode_superblock(found.kvs[0].value).uuid == superblock.uuid
    if not made:
        if (await store.range(Range(keys.condemned))).kvs:
            raise AlreadyFormatted(half_gone(volume))
        raise AlreadyFormatted(f"volume {volume!r} exists already; `apollofs destroy` removes it")
    return superblock


def _beginning(root: Inode, now_ns: int) -> SlotRecord:
    """The first record of the change log: the root directory."""
    change = Change(Kind.MKDIR, root.ino, root.parent, b"", now_ns, root.mode, uid=root.uid, gid=root.gid)
    return SlotRecord(0, 0, now_ns, (change,))


def check_sizes(block_bytes: int, inline_bytes_max: int) -> None:
    """Raises InvalidArgument."""
    if block_bytes < 1 << 16 or block_bytes > 1 << 28 or block_bytes & (block_bytes - 1):
        raise InvalidArgument(f"block size must be a power of two from 64 KiB to 256 MiB, not {block_bytes}")
    if not 0 <= inline_bytes_max <= min(INLINE_BYTES_MAX, block_bytes):
        raise InvalidArgument(f"inline limit must be from 0 to 1 MiB and at most a block, not {inline_bytes_max}")


def check_site_name(name: str) -> None:
    """Raises InvalidArgument."""
    if not name.isascii() or not 1 <= len(name) <= 64 or not all(c.isalnum() or c in "._-" for c in name):
        raise InvalidArgument(f"bad site name {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")


# -- sites ------------------------------------------------------------------------------------------------------------


async def read_superblock(store: Store, volume: str) -> Superblock:
    """Raises NotFormatted."""
    found = await store.range(Range(Keys(volume).superblock))
    if not found.kvs:
        raise await absence(store, volume)
    return codec.decode_superblock(found.kvs[0].value)


async def absence(store: Store, volume: str) -> NotFormatted:
    """What is to be said where there is no superblock."""
    if (await store.range(Range(Keys(volume).condemned))).kvs:
        return NotFormatted(half_gone(volume))
    return NotFormatted(f"there is no volume {volume!r}: make it with `apollofs format`")


async def list_sites(store: Store, volume: str) -> list[SiteRecord]:
    await read_superblock(store, volume)
    return await read_sites(store, Keys(volume))


def half_gone(volume: str) -> str:
    return f"volume {volume!r} is being destroyed: `apollofs destroy` goes on with it"


async def read_sites(store: Store, keys: Keys) -> list[SiteRecord]:
    found = await store.range(Range(keys.sites, prefix_end(keys.sites)))
    return sorted((codec.decode_site(kv.value) for kv in found.kvs), key=lambda site: site.id)


async def add_site(store: Store, volume: str, name: str, site_store: tuple[tuple[str, str], ...]) -> SiteRecord:
    """Give the volume one more site. Raises AlreadyFormatted if it has one of this name, QuotaExceeded after 255, those
    that were removed included."""
    keys = Keys(volume)
    check_site_name(name)
    while True:
        sites = await list_sites(store, volume)
        if any(site.name == name for site in sites):
            raise AlreadyFormatted(f"volume {volume!r} has a site {name!r} already")
        found = await store.range(Range(keys.superblock))
        if not found.kvs:
            raise NotFormatted(f"volume {volume!r} has just been destroyed")
        superblock = codec.decode_superblock(found.kvs[0].value)
        if superblock.sites_made >= SITE_ID_MAX:
            raise QuotaExceeded(f"a volume can be given {SITE_ID_MAX} sites in all")
        site = SiteRecord(superblock.sites_made + 1, name, site_store)
        compares = (
            Compare(keys.superblock, Target.MOD, Relation.EQUAL, found.kvs[0].mod_revision),
            Compare(keys.site(name), Target.VERSION, Relation.EQUAL, 0),
        )
        puts = (
            Put(keys.superblock, codec.encode_superblock(replace(superblock, sites_made=site.id))),
            Put(keys.site(name), codec.encode_site(site)),
        )
        if (await store.txn(compares, puts)).succeeded:
            return site


async def remove_site(store: Store, volume: str, name: str) -> None:
    """Take a site away; copies there are forgotten, and stay in its store. Nobody begins to use it meanwhile.

    Raises UnknownSite; SiteInUse while it is mounted, a policy names it, bodies were written there, or it is the last
    one. Interrupted for good, it leaves the site marked: called again it ends that, or takes the mark away.
    """
    keys = Keys(volume)
    sites = await list_sites(store, volume)
    site = next((site for site in sites if site.name == name), None)
    if site is None:
        raise UnknownSite(f"volume {volume!r} has no site {name!r}")
    async with retired_sites.leaving(store, keys, site.id) as ours:
        other = next((each for each in sites if each is not site), None)
        if other is None:
            raise SiteInUse(f"{name!r} is the only site of volume {volume!r}")
        await _check_unused(store, keys, site)
        await forget_site(store, keys, site.id)
        compares = (ours, Compare(keys.site(other.name), Target.VERSION, Relation.GREATER, 0))
        puts = (
            Put(keys.retired_site(site.id), retired_sites.REMOVED),
            Delete(keys.site(name)),
            Delete(keys.agent_state(site.id)),
        )
        if not (await store.txn(compares, puts)).succeeded:
            raise SiteInUse("somebody else has just removed, or tried to remove, a site: try again")


async def _check_unused(store: Store, keys: Keys, site: SiteRecord) -> None:
    """Raises SiteInUse."""
    name = site.name
    for mount in await list_mounts(store, keys.volume):
        if mount.site == name:
            raise SiteInUse(_user_of(mount))
    if await has_segments_at(store, keys, site.id):
        raise SiteInUse(f"site {name!r} holds segments of the change log")
    holder = await _first_body_at(store, keys, site.id)
    if holder is not None:
        raise SiteInUse(f"site {name!r} holds bodies of {holder}")
    policies, _ = await read_policies(store, keys)
    named = sum(site.id in decode_policy(kv.value).named for kv in policies.values())
    if named:
        raise SiteInUse(f"site {name!r} is named by {named} policies: see `apollofs policy list`")


def _user_of(mount: MountRecord) -> str:
    if mount.serves_files:
        return f"site {mount.site!r} is mounted on {mount.host} at {mount.mountpoint}: unmount it first"
    return f"site {mount.site!r} is used by process {mount.pid} on {mount.host}: end it first"


async def _first_body_at(store: Store, keys: Keys, site_id: int) -> str | None:
    """Which table names a blob in this site's store, or None. Reads the whole namespace, in pages."""
    for letter, blobs_of in BLOBS_IN.items():
        async with aclosing(pages(store, keys.table(letter))) as found:
            async for kv in found:
                if any(blob >> 56 == site_id for blob in blobs_of(kv.value)):
                    return "removed files" if letter == b"g" else "files"
    return None


def _dentry_blobs(value: bytes) -> list[int]:
    inode = codec.decode_dentry(value, 0).inode
    return [extent.blob for extent in inode.extents] if inode else []


def _inode_blobs(value: bytes) -> list[int]:
    return [extent.blob for extent in codec.decode_inode(value, 0).extents]


def _page_blobs(value: bytes) -> list[int]:
    return [extent.blob for extent in codec.decode_extents(value)]


def _tombstone_blobs(value: bytes) -> list[int]:
    stone = codec.decode_tombstone(value, 0)
    return [blob for blob, _ in stone.blobs] + [extent.blob for extent in (stone.inode.extents if stone.inode else ())]


BLOBS_IN: Mapping[bytes, Callable[[bytes], list[int]]] = {
    b"d": _dentry_blobs,
    b"i": _inode_blobs,
    b"e": _page_blobs,
    b"g": _tombstone_blobs,
}
"""Table -> the blobs that a value of it refers to: all places where a blob is named."""


async def pages(
    store: Store, prefix: bytes, *, revision: int = 0, keys_only: bool = False
) -> AsyncGenerator[KeyValue, None]:
    """Every key with the prefix, in order, read in pages."""
    start, end = prefix, prefix_end(prefix)
    while True:
        found = await store.range(Range(start, end, limit=PAGE_KEYS, revision=revision, keys_only=keys_only))
        for kv in found.kvs:
            yield kv
        if not found.more:
            return
        start = found.kvs[-1].key + b"\0"


# -- mounts ----------------------------------------------------------------------------------------------------------


async def list_mounts(store: Store, volume: str) -> list[MountRecord]:
    """Every session whose lease lives: mounts, and commands that work on the volume (`serves_files`)."""
    await read_superblock(store, volume)
    keys = Keys(volume)
    found = await store.range(Range(keys.mounts, prefix_end(keys.mounts)))
    return [codec.decode_mount(kv.value) for kv in found.kvs]
