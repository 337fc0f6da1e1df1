"""Records to bytes and back: msgpack arrays that start with a schema number. The only module that imports msgpack.

Trailing fields that have their default are left out, so a file costs about 100 bytes. A record of a newer schema is
`UnsupportedFormat`; bytes that don't decode are `CorruptRecord`, naming the key's table and number, never the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import msgpack

from apollofs.metadata.errors import CorruptRecord, UnsupportedFormat
from apollofs.metadata.records import (
    Extent,
    Inode,
    InodeFlag,
    MountRecord,
    SiteRecord,
    Superblock,
    Usage,
)

SCHEMA = 1
DECODED_MAX = 2048
"""Inodes and dentries whose decoded form is kept: the same bytes are asked for again and again."""
_pack: Callable[[Any], bytes] = msgpack.Packer(use_bin_type=True).pack
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Dentry:
    """Value of `d/<parent>/<name>`: a reference (type, ino) or, for a file with one name, its whole inode."""

    ino: int
    file_type: int
    inode: Inode | None


@dataclass(frozen=True, slots=True)
class Times:
    """Value of `t/<dir>`."""

    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Value of `g/...`: what lost its last name, or (`inode` None) the blobs that a body no longer refers to."""

    ino: int
    session: int
    parent: int
    name: bytes
    inode: Inode | None
    blobs: tuple[tuple[int, int], ...]
    """(blob, its length in bytes); for a dead inode its extents name them, and this is empty."""
    condemned: bool = False
    """The collector has begun to remove what it owns: it can't be restored any more."""


def _decoder(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def decode(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as exc:
            raise CorruptRecord(f"{function.__name__}: a record does not decode: {exc}") from exc

    return decode


def _unpack(data: bytes) -> list[Any]:
    fields: list[Any] = msgpack.unpackb(data, use_list=True, raw=False, strict_map_key=False)
    if not isinstance(fields, list) or not fields:
        raise ValueError("not a record")
    if fields[0] != SCHEMA:
        raise UnsupportedFormat(f"a record has schema {fields[0]!r}, this version knows {SCHEMA}: upgrade apollofs")
    return fields


# -- inodes and dentries ----------------------------------------------------------------------------------------------

_INODE_DEFAULTS: tuple[Any, ...] = (0, b"", 0, [], 0, 0, 0, b"", 0, 0, 0, b"", 0, 0, 0)
_INODE_FIXED = 10


def _inode_fields(inode: Inode) -> list[Any]:
    fields: list[Any] = [
        inode.ino,
        inode.mode,
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.size_bytes,
        inode.atime_ns,
        inode.mtime_ns,
        inode.ctime_ns,
        inode.btime_ns,
        inode.rdev,
        inode.target,
        int(inode.flags),
        _extent_fields(inode.extents),
        inode.inline_bytes,
        inode.body_version,
        inode.parent,
        inode.name,
        inode.xattrs,
        inode.extent_pages,
        inode.extents_bytes,
        inode.copy,
        inode.policy,
        inode.seal,
        inode.inline_at,
    ]
    while len(fields) > _INODE_FIXED and fields[-1] == _INODE_DEFAULTS[len(fields) - 1 - _INODE_FIXED]:
        fields.pop()
    return fields


def _inode_of(fields: Sequence[Any], revision: int) -> Inode:
    (ino, mode, nlink, uid, gid, size_bytes, atime_ns, mtime_ns, ctime_ns, btime_ns) = fields[:_INODE_FIXED]
    optional = [*fields[_INODE_FIXED:], *_INODE_DEFAULTS[len(fields) - _INODE_FIXED :]]
    rdev, target, flags, extents, inline, version, parent, name, xattrs, pages, extents_bytes, *late = optional
    copy, policy, seal, inline_at = late
    return Inode(
        ino,
        mode,
        nlink,
        uid,
        gid,
        size_bytes,
        atime_ns,
        mtime_ns,
        ctime_ns,
        btime_ns,
        rdev,
        target,
        InodeFlag(flags) if flags else InodeFlag(0),
        _extents_of(extents) if extents else (),
        inline,
        version,
        parent,
        name,
        revision,
        xattrs,
        pages,
        extents_bytes,
        copy,
        policy,
        seal,
        inline_at,
    )


def _extent_fields(extents: Sequence[Extent]) -> list[int]:
    flat: list[int] = []
    for e in extents:
        flat += (e.offset, e.length, e.blob, e.blob_offset, e.blob_length)
    return flat


def _extents_of(flat: Sequence[int]) -> tuple[Extent, ...]:
    return tuple(Extent(*flat[at : at + 5]) for at in range(0, len(flat), 5))


def encode_inode(inode: Inode) -> bytes:
    """Value of `i/<ino>`."""
    return _pack([SCHEMA, *_inode_fields(inode)])


@lru_cache(maxsize=DECODED_MAX)
@_decoder
def decode_inode(data: bytes, revision: int) -> Inode:
    return _inode_of(_unpack(data)[1:], revision)


def encode_reference(ino: int, file_type: int) -> bytes:
    return _pack([SCHEMA, 0, ino, file_type])


def encode_embedded(inode: Inode) -> bytes:
    return _pack([SCHEMA, 1, *_inode_fields(inode)])


@lru_cache(maxsize=DECODED_MAX)
@_decoder
def decode_dentry(data: bytes, revision: int) -> Dentry:
    fields = _unpack(data)
    if fields[1] == 0:
        return Dentry(fields[2], fields[3], None)
    inode = _inode_of(fields[2:], revision)
    return Dentry(inode.ino, inode.mode & 0o170000, inode)


def encode_extents(extents: Sequence[Extent]) -> bytes:
    """Value of `e/<ino>/<page>`."""
    return _pack([SCHEMA, _extent_fields(extents)])


@_decoder
def decode_extents(data: bytes) -> tuple[Extent, ...]:
    return _extents_of(_unpack(data)[1])


# -- small values -----------------------------------------------------------------------------------------------------


def encode_times(times: Times) -> bytes:
    return _pack([SCHEMA, times.mtime_ns, times.ctime_ns])


@_decoder
def decode_times(data: bytes) -> Times:
    _, mtime_ns, ctime_ns = _unpack(data)
    return Times(mtime_ns, ctime_ns)


def encode_location(parent: int, name: bytes) -> bytes:
    """Value of `w/<ino>`."""
    return _pack([SCHEMA, parent, name])


@_decoder
def decode_location(data: bytes) -> tuple[int, bytes]:
    _, parent, name = _unpack(data)
    return parent, name


def encode_tombstone(tombstone: Tombstone) -> bytes:
    inode = _inode_fields(tombstone.inode) if tombstone.inode is not None else None
    flat = [number for pair in tombstone.blobs for number in pair]
    condemned = [True] if tombstone.condemned else []
    return _pack([SCHEMA, tombstone.ino, tombstone.session, tombstone.parent, tombstone.name, inode, flat, *condemned])


@_decoder
def decode_tombstone(data: bytes, revision: int) -> Tombstone:
    _, ino, session, parent, name, inode, flat, *condemned = _unpack(data)
    blobs = tuple((flat[at], flat[at + 1]) for at in range(0, len(flat), 2))
    dead = _inode_of(inode, revision) if inode is not None else None
    return Tombstone(ino, session, parent, name, dead, blobs, bool(condemned))


# -- volume -----------------------------------------------------------------------------------------------------------


def encode_superblock(s: Superblock) -> bytes:
    return _pack(
        [SCHEMA, s.uuid, s.name, s.block_bytes, s.inline_bytes_max, list(s.features), s.created_ns, s.sites_made]
    )


@_decoder
def decode_superblock(data: bytes) -> Superblock:
    _, uuid, name, block_bytes, inline_bytes_max, features, created_ns, sites_made = _unpack(data)
    return Superblock(uuid, name, block_bytes, inline_bytes_max, tuple(features), created_ns, sites_made)


def encode_site(site: SiteRecord) -> bytes:
    return _pack([SCHEMA, site.id, site.name, [list(pair) for pair in site.store]])


@_decoder
def decode_site(data: bytes) -> SiteRecord:
    _, id_, name, store = _unpack(data)
    return SiteRecord(id_, name, tuple((key, value) for key, value in store))


def encode_mount(m: MountRecord) -> bytes:
    return _pack([SCHEMA, m.session, m.host, m.pid, m.mountpoint, m.site, m.version, m.started_ns])


@_decoder
def decode_mount(data: bytes) -> MountRecord:
    return MountRecord(*_unpack(data)[1:])


def encode_usage(usage: Usage) -> bytes:
    return _pack([SCHEMA, usage.bytes, usage.inodes])


@_decoder
def decode_usage(data: bytes) -> Usage:
    _, bytes_, inodes = _unpack(data)
    return Usage(bytes_, inodes)


def encode_counter(number: int) -> bytes:
    return _pack([SCHEMA, number])


@_decoder
def decode_counter(data: bytes) -> int:
    _, number = _unpack(data)
    return int(number)


def encode_fields(fields: Sequence[Any]) -> bytes:
    """Records whose module owns their layout (journal, locks): integers, bytes, strings and lists of them."""
    return _pack([SCHEMA, *fields])


@_decoder
def decode_fields(data: bytes) -> list[Any]:
    return _unpack(data)[1:]
