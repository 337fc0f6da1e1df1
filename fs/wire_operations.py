"""The requests that pyfuse3 has no handler for, or hands on with half of what they say."""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeAlias, TypeVar

from apollofs.fs.attributes import Attributes
from apollofs.fs.wire_constants import OpenReplyFlag
from apollofs.fs.wire_load import pyfuse3
from apollofs.fs.wire_replies import DirectoryReply, LockRange
from apollofs.fs.wire_structs import (
    CopyRangeRequest,
    CreateDetails,
    FallocateRequest,
    IoctlRequest,
    LockRequest,
    LseekRequest,
    ReadDirectoryRequest,
    ReleaseDetails,
    Request,
    SetxattrRequest,
    StatxRequest,
)

T = TypeVar("T")
Reply: TypeAlias = T | Coroutine[Any, Any, T]
"""A handler answers at once by returning the value, or later by being `async`."""


def _unsupported() -> NoReturn:
    raise pyfuse3.FUSEError(errno.ENOSYS)


class WireOperations:
    """Handlers that `Wire` serves beneath pyfuse3.  Override those that the filesystem has.

    What is not overridden is not intercepted: the kernel then does what it does without support (locks that hold on
    this host only, EOPNOTSUPP for fallocate, ENOTTY for ioctl, a copy through the page cache).

    A handler may be a plain function: it is answered on the spot, in about 5 us, and must not block.  Or `async`: it
    runs in a task of its own, and FUSE_INTERRUPT cancels it (the caller gets EINTR).  Errors: raise FUSEError or what
    the mount's `errno_of` knows; anything else is EIO, logged and counted.  A result that cannot be encoded is a bug
    of the handler and also EIO.
    """

    def getlk(self, request: Request, lock: LockRequest) -> Reply[LockRange]:
        """The first lock that would conflict with `lock`, or one of kind F_UNLCK."""
        _unsupported()

    def setlk(self, request: Request, lock: LockRequest, *, wait: bool) -> Reply[None]:
        """Take, convert or (F_UNLCK) give back a lock.

        Errors: EAGAIN if it conflicts and not `wait`; EDEADLK; ENOLCK.  When cancelled (EINTR) no lock may remain
        that was not held before.
        """
        _unsupported()

    def fallocate(self, request: Request, allocate: FallocateRequest) -> Reply[None]:
        """Allocate, punch or zero.  Errors: EOPNOTSUPP for other modes, ENOSPC, EFBIG, EINVAL."""
        _unsupported()

    def lseek(self, request: Request, seek: LseekRequest) -> Reply[int]:
        """Offset of the next data or hole.  Errors: ENXIO past the end; EINVAL for another whence."""
        _unsupported()

    def copy_file_range(self, request: Request, copy: CopyRangeRequest) -> Reply[int]:
        """Copy within the mount; the number of bytes copied, at most 2**32 - 1.  Errors: EXDEV, EOPNOTSUPP.

        Those two make the caller's kernel or libc copy by reading and writing.
        """
        _unsupported()

    def ioctl(self, request: Request, ioctl: IoctlRequest) -> Reply[bytes]:
        """Data to hand out, at most `out_size_max` bytes.  Errors: ENOTTY for a command that is not known.

        lsattr comes as FS_IOC_GETFLAGS, with 4 bytes to hand out.  chattr comes as FS_IOC_FSGETXATTR (28 bytes) and
        then FS_IOC_SETFLAGS (4 bytes in): answer both, or it fails with ENOTTY.  The kernel has checked the caller's
        capabilities; it opens and releases the inode around the call and demands exactly `out_size_max` bytes.
        """
        _unsupported()

    def statx(self, request: Request, statx: StatxRequest) -> Reply[Attributes]:
        """All attributes with the birth time; comes only when the caller asks for that time."""
        _unsupported()

    def open_directory(self, request: Request) -> Reply[tuple[int, OpenReplyFlag]]:
        """OPENDIR: a handle for the directory `request.ino`, and how the kernel is to treat it."""
        _unsupported()

    def release_directory(self, request: Request, release: ReleaseDetails) -> Reply[None]:
        """RELEASEDIR: the handle `release.fh` is closed."""
        _unsupported()

    def read_directory(self, request: Request, read: ReadDirectoryRequest, reply: DirectoryReply) -> Reply[None]:
        """Fill `reply` with the entries after `read.offset`; leave it empty at the end.

        Take lookup counts (see DirectoryReply.add) with no await between the last `add` and the return: an entry that
        was added to a reply which is then not sent was never counted by the kernel.
        """
        _unsupported()

    def set_xattr(self, request: Request, xattr: SetxattrRequest) -> Reply[None]:
        """Set an extended attribute in one step.  Errors: EEXIST with XATTR_CREATE, ENODATA with XATTR_REPLACE."""
        _unsupported()

    def tmpfile(self, request: Request, create: CreateDetails) -> Reply[tuple[Attributes, int]]:
        """open(O_TMPFILE) in the directory `request.ino`: attributes of a file without a name (nlink 0), and its fh.

        The kernel's lookup count of the new inode is 1 afterwards.
        """
        _unsupported()
