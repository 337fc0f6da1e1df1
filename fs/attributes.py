"""What the filesystem tells of an inode, free of any FUSE library's types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Attributes(NamedTuple):
    """stat(2) and statx(2) of one inode, and how long the kernel may keep them."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    blocks: int
    """In units of 512 bytes."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    flags: int = 0
    """FS_IMMUTABLE_FL and FS_APPEND_FL bits."""
    attr_timeout_s: float = 0.0
    entry_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FilesystemStatistics:
    """statfs(2), in bytes and inodes."""

    block_bytes: int
    total_bytes: int
    free_bytes: int
    total_inodes: int
    free_inodes: int
    name_bytes_max: int


@dataclass(frozen=True, slots=True)
class OpenFlags:
    """How an opened file is to be served: what the FUSE reply of OPEN and CREATE says."""

    fh: int
    direct_io: bool = False
    keep_cache: bool = False
    backing_id: int = 0
    """Of the local file that the kernel serves it from by itself (passthrough); 0: it does not."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: effective ids, thread id and umask of the process behind a request."""

    uid: int
    gid: int
    pid: int
    umask: int = 0
