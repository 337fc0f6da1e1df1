"""Requests: pure functions from bytes read on /dev/fuse to typed values.

Layouts are those of the kernel's include/uapi/linux/fuse.h; little-endian machines only, as FUSE uses the host's
order and every machine this runs on is one.  Decoders take the body of a request (what follows the 40-byte header),
which may be longer than they need; one that is too short raises struct.error.  Nothing here does I/O.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from apollofs.fs.wire_constants import FS_FLAGS_AS_XFLAGS, LOCK_FLOCK

NANOSECONDS = 1_000_000_000


class Request(NamedTuple):
    """The header of a request: who asks what of which inode."""

    opcode: int
    unique: int
    """The kernel's number of this request."""
    ino: int
    uid: int
    gid: int
    pid: int
    """Thread id of the caller as the daemon's pid namespace sees it; 0 where there is none."""


class LockRequest(NamedTuple):
    """GETLK, SETLK and SETLKW.  `end` is inclusive, 2**63 - 1 for "to the end of the file"."""

    fh: int
    owner: int
    """Opaque: a process for fcntl locks, an open file description for flock and OFD locks."""
    start: int
    end: int
    kind: int
    """fcntl.F_RDLCK, F_WRLCK or F_UNLCK."""
    pid: int
    flock: bool


class WriteDetails(NamedTuple):
    """WRITE.  `open_flags` are those of the descriptor (O_APPEND, O_SYNC); `write_flags` are `WriteFlag` bits."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    open_flags: int


class ReadDetails(NamedTuple):
    """READ, READDIR and READDIRPLUS."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    open_flags: int


class OpenDetails(NamedTuple):
    """OPEN and OPENDIR: open(2) flags, and FUSE_OPEN_* bits (`OPEN_KILL_SUIDGID`)."""

    flags: int
    open_flags: int


class CreateDetails(NamedTuple):
    """CREATE and TMPFILE.  `mode` has the umask applied unless DONT_MASK was negotiated."""

    flags: int
    mode: int
    umask: int
    open_flags: int


class SetattrDetails(NamedTuple):
    """SETATTR; a field counts only where its `SetattrValid` bit is set."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    uid: int
    gid: int


class FlushDetails(NamedTuple):
    """FLUSH: one close(2); the fcntl locks of `lock_owner` on the inode end."""

    fh: int
    lock_owner: int


class ReleaseDetails(NamedTuple):
    """RELEASE: the last close; with RELEASE_FLOCK_UNLOCK the flock of `lock_owner` ends."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class FallocateRequest(NamedTuple):
    """FALLOCATE; `mode` has the FALLOC_FL_* bits."""

    fh: int
    offset: int
    length: int
    mode: int


class LseekRequest(NamedTuple):
    """LSEEK, only ever with SEEK_DATA or SEEK_HOLE."""

    fh: int
    offset: int
    whence: int


class CopyRangeRequest(NamedTuple):
    """COPY_FILE_RANGE; the header's inode is the source."""

    fh_in: int
    offset_in: int
    ino_out: int
    fh_out: int
    offset_out: int
    length: int
    flags: int


class IoctlRequest(NamedTuple):
    """IOCTL.  `fh` is that of a directory where flags has IOCTL_DIR."""

    fh: int
    flags: int
    command: int
    argument: int
    data: bytes
    out_size_max: int


class StatxRequest(NamedTuple):
    """STATX: fh is None when the call was by path."""

    fh: int | None
    flags: int
    mask: int


class ReadDirectoryRequest(NamedTuple):
    """READDIR and READDIRPLUS: `offset` is 0 or what the last entry received carried; `size_max` in bytes."""

    fh: int
    offset: int
    size_max: int
    plus: bool


class SetxattrRequest(NamedTuple):
    """SETXATTR; `flags` is 0, XATTR_CREATE or XATTR_REPLACE; `kill_sgid` comes with ACLs only."""

    name: bytes
    value: bytes
    flags: int
    kill_sgid: bool


_LOCK = Struct("<QQQQIIII")
_IO = Struct("<QqIIQI4x")
_OPEN = Struct("<II")
_CREATE = Struct("<IIII")
_SETATTR = Struct("<I4xQQQqqqIIII4xII4x")
_FLUSH = Struct("<Q8xQ")
_RELEASE = Struct("<QIIQ")
_FALLOCATE = Struct("<QqqI4x")
_LSEEK = Struct("<QqI4x")
_COPY = Struct("<QqQQqQQ")
_IOCTL = Struct("<QIIQII")
_STATX = Struct("<I4xQII")
_SETXATTR = Struct("<II")
_SETXATTR_EXT = Struct("<III4x")
_U32 = Struct("<I")


def decode_lock(body: bytes) -> LockRequest:
    """Body of GETLK, SETLK, SETLKW (fuse_lk_in)."""
    fh, owner, start, end, kind, pid, flags, _ = _LOCK.unpack_from(body)
    return LockRequest(fh, owner, start, end, kind, pid, bool(flags & LOCK_FLOCK))


def decode_write(body: bytes) -> WriteDetails:
    """Body of WRITE (fuse_write_in), without the data."""
    return WriteDetails._make(_IO.unpack_from(body))


def decode_read(body: bytes) -> ReadDetails:
    """Body of READ, READDIR, READDIRPLUS (fuse_read_in)."""
    return ReadDetails._make(_IO.unpack_from(body))


def decode_open(body: bytes) -> OpenDetails:
    """Body of OPEN and OPENDIR (fuse_open_in)."""
    return OpenDetails._make(_OPEN.unpack_from(body))


def decode_create(body: bytes) -> CreateDetails:
    """Body of CREATE and TMPFILE (fuse_create_in), without the name."""
    return CreateDetails._make(_CREATE.unpack_from(body))


def decode_setattr(body: bytes) -> SetattrDetails:
    """Body of SETATTR (fuse_setattr_in)."""
    valid, fh, size, owner, asec, msec, csec, ansec, mnsec, cnsec, mode, uid, gid = _SETATTR.unpack_from(body)
    return SetattrDetails(
        valid,
        fh,
        size,
        owner,
        asec * NANOSECONDS + ansec,
        msec * NANOSECONDS + mnsec,
        csec * NANOSECONDS + cnsec,
        mode,
        uid,
        gid,
    )


def decode_flush(body: bytes) -> FlushDetails:
    """Body of FLUSH (fuse_flush_in)."""
    return FlushDetails._make(_FLUSH.unpack_from(body))


def decode_release(body: bytes) -> ReleaseDetails:
    """Body of RELEASE and RELEASEDIR (fuse_release_in)."""
    return ReleaseDetails._make(_RELEASE.unpack_from(body))


def decode_fallocate(body: bytes) -> FallocateRequest:
    """Body of FALLOCATE (fuse_fallocate_in)."""
    return FallocateRequest._make(_FALLOCATE.unpack_from(body))


def decode_lseek(body: bytes) -> LseekRequest:
    """Body of LSEEK (fuse_lseek_in)."""
    return LseekRequest._make(_LSEEK.unpack_from(body))


def decode_copy_range(body: bytes) -> CopyRangeRequest:
    """Body of COPY_FILE_RANGE and its 64-bit form (fuse_copy_file_range_in)."""
    return CopyRangeRequest._make(_COPY.unpack_from(body))


def decode_ioctl(body: bytes) -> IoctlRequest:
    """Body of IOCTL (fuse_ioctl_in and the data that goes in)."""
    fh, flags, command, argument, in_size, out_size = _IOCTL.unpack_from(body)
    return IoctlRequest(fh, flags, command, argument, body[_IOCTL.size : _IOCTL.size + in_size], out_size)


def decode_fs_flags(data: bytes) -> int:
    """The flags that FS_IOC_SETFLAGS carries: an int, although the command's number says long."""
    flags: int = _U32.unpack_from(data)[0]
    return flags


def decode_fsxattr(data: bytes) -> int:
    """The FS_*_FL flags that FS_IOC_FSSETXATTR carries (struct fsxattr)."""
    (xflags,) = _U32.unpack_from(data)
    return sum(flag for flag, xflag in FS_FLAGS_AS_XFLAGS if xflags & xflag)


def decode_statx(body: bytes) -> StatxRequest:
    """Body of STATX (fuse_statx_in)."""
    getattr_flags, fh, flags, mask = _STATX.unpack_from(body)
    return StatxRequest(fh if getattr_flags & 1 else None, flags, mask)


def decode_setxattr(body: bytes, *, extended: bool) -> SetxattrRequest:
    """Body of SETXATTR; `extended` when SETXATTR_EXT was negotiated."""
    if extended:
        size, flags, more = _SETXATTR_EXT.unpack_from(body)
        at = _SETXATTR_EXT.size
    else:
        (size, flags), more = _SETXATTR.unpack_from(body), 0
        at = _SETXATTR.size
    end = body.index(b"\0", at)
    return SetxattrRequest(body[at:end], body[end + 1 : end + 1 + size], flags, bool(more & 1))
