"""The requests that pyfuse3 has no handler for: locks, allocation, holes, copies, flags, directories, xattr flags."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Coroutine
from typing import Any

from apollofs.fs.attributes import Attributes, Caller
from apollofs.fs.directories import Entries
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.references import References
from apollofs.fs.wire_constants import (
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    OpenReplyFlag,
)
from apollofs.fs.wire_load import pyfuse3
from apollofs.fs.wire_operations import WireOperations
from apollofs.fs.wire_replies import DirectoryReply, LockRange, encode_fs_flags, encode_fsxattr
from apollofs.fs.wire_structs import (
    CopyRangeRequest,
    FallocateRequest,
    IoctlRequest,
    LockRequest,
    LseekRequest,
    ReadDirectoryRequest,
    ReleaseDetails,
    Request,
    SetxattrRequest,
    StatxRequest,
    decode_fs_flags,
    decode_fsxattr,
)
from apollofs.metadata.locks import LockKind, LockType

ENTRIES_MAX = 1000
"""Entries asked of the Filesystem for one request; the kernel's buffer holds fewer."""
DOTS = (b".", b"..")


class InterceptedOperations(WireOperations):
    """Served by the Wire beneath pyfuse3. Also counts the kernel's references, which both halves change."""

    def __init__(self, filesystem: Filesystem) -> None:
        super().__init__()
        self._filesystem = filesystem
        self.references = References(filesystem.forget)
        """What the kernel was given and has not forgotten."""

    def _told(self, attributes: Attributes, tid: int) -> None:
        """Attributes are about to be replied."""
        if attributes.attr_timeout_s and stat.S_ISDIR(attributes.mode):
            self._filesystem.kernel.answers_getattr(attributes.ino, tid)

    # -- locks -------------------------------------------------------------------------------------------------------

    async def getlk(self, request: Request, lock: LockRequest) -> LockRange:
        if lock.kind == fcntl.F_UNLCK:
            raise pyfuse3.FUSEError(errno.EINVAL)
        found = await self._filesystem.getlk(
            request.ino, LockKind.POSIX, lock.owner, lock.start, lock.end, _lock_type(lock.kind)
        )
        if found is None:
            return LockRange(lock.start, lock.end, fcntl.F_UNLCK, 0)
        kind = fcntl.F_WRLCK if found.type is LockType.EXCLUSIVE else fcntl.F_RDLCK
        return LockRange(found.start, found.end, kind, found.pid)

    async def setlk(self, request: Request, lock: LockRequest, *, wait: bool) -> None:
        kind = LockKind.FLOCK if lock.flock else LockKind.POSIX
        type_ = None if lock.kind == fcntl.F_UNLCK else _lock_type(lock.kind)
        await self._filesystem.setlk(request.ino, kind, lock.owner, lock.start, lock.end, type_, lock.pid, wait=wait)

    # -- ranges ------------------------------------------------------------------------------------------------------

    async def fallocate(self, request: Request, allocate: FallocateRequest) -> None:
        await self._filesystem.fallocate(allocate.fh, allocate.mode, allocate.offset, allocate.length)

    async def lseek(self, request: Request, seek: LseekRequest) -> int:
        return await self._filesystem.lseek(seek.fh, seek.offset, seek.whence)

    async def copy_file_range(self, request: Request, copy: CopyRangeRequest) -> int:
        return await self._filesystem.copy_file_range(
            copy.fh_in, copy.offset_in, copy.fh_out, copy.offset_out, copy.length, copy.flags
        )

    # -- attributes --------------------------------------------------------------------------------------------------

    async def statx(self, request: Request, statx: StatxRequest) -> Attributes:
        attributes = await self._filesystem.getattr(request.ino)
        self._told(attributes, request.pid)
        return attributes

    async def ioctl(self, request: Request, ioctl: IoctlRequest) -> bytes:
        caller = Caller(request.uid, request.gid, request.pid)
        if ioctl.command == FS_IOC_GETFLAGS:
            return encode_fs_flags(await self._filesystem.get_flags(request.ino), ioctl.out_size_max)
        if ioctl.command == FS_IOC_FSGETXATTR:
            return encode_fsxattr(await self._filesystem.get_flags(request.ino))
        if ioctl.command == FS_IOC_SETFLAGS:
            await self._filesystem.set_flags(request.ino, decode_fs_flags(ioctl.data), caller)
            return b""
        if ioctl.command == FS_IOC_FSSETXATTR:
            await self._filesystem.set_flags(request.ino, decode_fsxattr(ioctl.data), caller)
            return b""
        raise pyfuse3.FUSEError(errno.ENOTTY)

    async def set_xattr(self, request: Request, xattr: SetxattrRequest) -> None:
        if xattr.flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self._filesystem.setxattr(request.ino, xattr.name, xattr.value, xattr.flags)

    # -- directories -------------------------------------------------------------------------------------------------

    def open_directory(self, request: Request) -> tuple[int, OpenReplyFlag]:
        opened = self._filesystem.opendir(request.ino)
        flags = OpenReplyFlag.CACHE_DIR if opened.cache else OpenReplyFlag(0)
        return opened.fh, flags | OpenReplyFlag.KEEP_CACHE if opened.keep else flags

    def release_directory(self, request: Request, release: ReleaseDetails) -> None:
        self._filesystem.releasedir(release.fh)

    def read_directory(
        self, request: Request, read: ReadDirectoryRequest, reply: DirectoryReply
    ) -> Coroutine[Any, Any, None] | None:
        found = self._filesystem.cached_readdir(request.ino, read.fh, read.offset, ENTRIES_MAX)
        if found is None:
            return self._read_directory(request, read, reply)
        self._fill(request, found, reply)
        return None

    async def _read_directory(self, request: Request, read: ReadDirectoryRequest, reply: DirectoryReply) -> None:
        with self._filesystem.kernel.locked(request.ino):
            found = await self._filesystem.readdir(read.fh, read.offset, ENTRIES_MAX)
        self._fill(request, found, reply)

    def _fill(self, request: Request, found: Entries, reply: DirectoryReply) -> None:
        directory = request.ino
        for after, entry in found:
            named_only = not reply.plus or entry.name in DOTS
            attributes = None if named_only else self._filesystem.listed(directory, entry)
            if attributes is None:
                if not reply.add_name(entry.name, entry.ino, entry.file_type, after):
                    return
                continue
            if not reply.add(entry.name, attributes, after):
                return
            self._told(attributes, request.pid)
            self.references.add(entry.ino)
            self._filesystem.remember(directory, entry)


def _lock_type(kind: int) -> LockType:
    if kind == fcntl.F_RDLCK:
        return LockType.SHARED
    if kind == fcntl.F_WRLCK:
        return LockType.EXCLUSIVE
    raise pyfuse3.FUSEError(errno.EINVAL)
