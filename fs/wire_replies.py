"""Replies and notifications: pure functions from typed values to bytes written on /dev/fuse.

The counterpart of `wire_structs`, with the same source (the kernel's include/uapi/linux/fuse.h) and the same rule:
nothing here does I/O.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from apollofs.fs.attributes import Attributes
from apollofs.fs.wire_constants import FS_FLAGS_AS_XFLAGS
from apollofs.fs.wire_structs import NANOSECONDS, ReadDirectoryRequest

BLOCK_BYTES = 4096
TIMEOUT_S_MAX = (1 << 32) - 1

STATX_BASIC_AND_BTIME = 0xFFF
STATX_ATTR_IMMUTABLE_AND_APPEND = 0x30
"""The same bits as FS_IMMUTABLE_FL and FS_APPEND_FL."""

_U32 = Struct("<I")
_U64 = Struct("<Q")
_S64 = Struct("<q")
_LOCK_OUT = Struct("<QQII")
_IOCTL_OUT = Struct("<iIII")
_ATTR = Struct("<QQQqqqIIIIIIIIII")
_ATTR_OUT = Struct("<QI4x")
_ENTRY = Struct("<QQQQII")
_OPEN_OUT = Struct("<QIi")
_STATX_OUT = Struct("<QII16x")
_STATX_STAT = Struct("<IIQIIIH2xQQQQ")
_STATX_TIME = Struct("<qI4x")
_STATX_DEVICE = Struct("<IIII112x")
_DIRENT = Struct("<QqII")
_WRITE_OUT = Struct("<I4x")
_INVAL_INODE = Struct("<Qqq")
_INVAL_ENTRY = Struct("<QII")
_DELETE = Struct("<QQI4x")
_STORE = Struct("<QQI4x")
_PRUNE = Struct("<I12x")
_FSXATTR = Struct("<I24x")
_NO_ENTRY = bytes(_ENTRY.size + _ATTR.size)


class LockRange(NamedTuple):
    """Answer to GETLK: the lock in the way, or kind F_UNLCK when there is none."""

    start: int
    end: int
    kind: int
    pid: int


def encode_lock(lock: LockRange) -> bytes:
    """Reply to GETLK (fuse_lk_out)."""
    return _LOCK_OUT.pack(*lock)


def encode_lseek(offset: int) -> bytes:
    """Reply to LSEEK (fuse_lseek_out)."""
    return _S64.pack(offset)


def encode_copied(copied_bytes: int, *, wide: bool) -> bytes:
    """Reply to COPY_FILE_RANGE (fuse_write_out), or with `wide` to COPY_FILE_RANGE_64."""
    return _U64.pack(copied_bytes) if wide else _WRITE_OUT.pack(copied_bytes)


def encode_ioctl(data: bytes, result: int = 0) -> bytes:
    """Reply to IOCTL (fuse_ioctl_out and the data that comes out)."""
    return _IOCTL_OUT.pack(result, 0, 0, 0) + data


def encode_fs_flags(flags: int, out_size_max: int) -> bytes:
    """The data of a reply to FS_IOC_GETFLAGS, as long as the caller wants it: 4 or 8 bytes."""
    return _U32.pack(flags).ljust(out_size_max, b"\0")[:out_size_max]


def encode_fsxattr(flags: int) -> bytes:
    """The data of a reply to FS_IOC_FSGETXATTR (struct fsxattr) for FS_*_FL flags."""
    return _FSXATTR.pack(sum(xflag for flag, xflag in FS_FLAGS_AS_XFLAGS if flags & flag))


def split_timeout(timeout_s: float) -> tuple[int, int]:
    """Seconds and nanoseconds of a cache timeout; below 0 counts as 0, too large as the largest."""
    if timeout_s <= 0:
        return 0, 0
    timeout_s = min(timeout_s, TIMEOUT_S_MAX)
    seconds = int(timeout_s)
    return seconds, min(int((timeout_s - seconds) * NANOSECONDS), NANOSECONDS - 1)


def encode_attr(a: Attributes) -> bytes:
    """struct fuse_attr.  Times before 1970 have negative seconds and nanoseconds that count upwards."""
    atime_s, atime_ns = divmod(a.atime_ns, NANOSECONDS)
    mtime_s, mtime_ns = divmod(a.mtime_ns, NANOSECONDS)
    ctime_s, ctime_ns = divmod(a.ctime_ns, NANOSECONDS)
    return _ATTR.pack(
        a.ino,
        a.size_bytes,
        a.blocks,
        atime_s,
        mtime_s,
        ctime_s,
        atime_ns,
        mtime_ns,
        ctime_ns,
        a.mode,
        a.nlink,
        a.uid,
        a.gid,
        a.rdev & 0xFFFFFFFF,
        BLOCK_BYTES,
        0,
    )


def encode_attr_out(attributes: Attributes) -> bytes:
    """Reply to GETATTR and SETATTR (fuse_attr_out)."""
    return _ATTR_OUT.pack(*split_timeout(attributes.attr_timeout_s)) + encode_attr(attributes)


def encode_entry(attributes: Attributes, generation: int = 0) -> bytes:
    """struct fuse_entry_out: once it reaches the kernel, the inode's lookup count is one higher."""
    entry_s, entry_ns = split_timeout(attributes.entry_timeout_s)
    attr_s, attr_ns = split_timeout(attributes.attr_timeout_s)
    head = _ENTRY.pack(attributes.ino, generation, entry_s, attr_s, entry_ns, attr_ns)
    return head + encode_attr(attributes)


def encode_create(attributes: Attributes, fh: int, open_reply_flags: int = 0, backing_id: int = 0) -> bytes:
    """Reply to CREATE and TMPFILE (fuse_entry_out, fuse_open_out)."""
    return encode_entry(attributes) + _OPEN_OUT.pack(fh, open_reply_flags, backing_id)


def encode_opened(fh: int, open_reply_flags: int) -> bytes:
    """Reply to OPENDIR (fuse_open_out)."""
    return _OPEN_OUT.pack(fh, open_reply_flags, 0)


def encode_statx(a: Attributes) -> bytes:
    """Reply to STATX (fuse_statx_out): everything that `Attributes` knows, birth time and flags too."""
    head = _STATX_OUT.pack(*split_timeout(a.attr_timeout_s), 0)
    stat = _STATX_STAT.pack(
        STATX_BASIC_AND_BTIME,
        BLOCK_BYTES,
        a.flags & STATX_ATTR_IMMUTABLE_AND_APPEND,
        a.nlink,
        a.uid,
        a.gid,
        a.mode,
        a.ino,
        a.size_bytes,
        a.blocks,
        STATX_ATTR_IMMUTABLE_AND_APPEND,
    )
    times = b"".join(
        _STATX_TIME.pack(*divmod(ns, NANOSECONDS)) for ns in (a.atime_ns, a.btime_ns, a.ctime_ns, a.mtime_ns)
    )
    return head + stat + times + _STATX_DEVICE.pack(os.major(a.rdev), os.minor(a.rdev), 0, 0)


class DirectoryReply:
    """Fills one reply to READDIR or READDIRPLUS, never past the size that the kernel asked for.

    Each entry carries `next_offset`, an opaque number from 1 to 2**63 - 1: the kernel sends it back to go on after
    that entry.  An empty reply says "end of directory".
    """

    __slots__ = ("_parts", "_room", "plus")

    def __init__(self, request: ReadDirectoryRequest) -> None:
        self.plus = request.plus
        self._room = request.size_max
        self._parts: list[bytes] = []

    def add(self, name: bytes, attributes: Attributes, next_offset: int) -> bool:
        """Append an entry with its attributes; False, and nothing changed, when it does not fit.

        In a reply to READDIRPLUS an entry that was added raises the kernel's lookup count of its inode by one, save
        for "." and "..": count it when this returns True and `plus` is set.  READDIR takes number and type only.
        """
        entry = encode_entry(attributes) if self.plus else b""
        return self._append(entry, name, attributes.ino, attributes.mode, next_offset)

    def add_name(self, name: bytes, ino: int, mode: int, next_offset: int) -> bool:
        """Append an entry without attributes: the kernel looks it up when it is used, and counts nothing now."""
        return self._append(_NO_ENTRY if self.plus else b"", name, ino, mode, next_offset)

    def to_bytes(self) -> bytes:
        """The reply's data as filled so far."""
        return b"".join(self._parts)

    def _append(self, entry: bytes, name: bytes, ino: int, mode: int, next_offset: int) -> bool:
        padding = -len(name) % 8
        size = len(entry) + _DIRENT.size + len(name) + padding
        if size > self._room:
            return False
        self._room -= size
        self._parts.append(entry + _DIRENT.pack(ino, next_offset, len(name), mode >> 12 & 15) + name + bytes(padding))
        return True


def encode_inval_inode(ino: int, offset: int, length: int) -> bytes:
    """Body of the notification INVAL_INODE."""
    return _INVAL_INODE.pack(ino, offset, length)


def encode_inval_entry(parent: int, name: bytes, flags: int) -> bytes:
    """Body of the notification INVAL_ENTRY."""
    return _INVAL_ENTRY.pack(parent, len(name), flags) + name + b"\0"


def encode_delete(parent: int, ino: int, name: bytes) -> bytes:
    """Body of the notification DELETE."""
    return _DELETE.pack(parent, ino, len(name)) + name + b"\0"


def encode_store(ino: int, offset: int, data: bytes) -> bytes:
    """Body of the notification STORE."""
    return _STORE.pack(ino, offset, len(data)) + data


def encode_prune(inos: Sequence[int]) -> bytes:
    """Notification to drop what nobody uses of these inodes (fuse_notify_prune_out, and their numbers)."""
    return _PRUNE.pack(len(inos)) + array("Q", inos).tobytes()
