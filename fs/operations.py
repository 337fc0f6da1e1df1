"""The FUSE shell: decodes a request, calls the Filesystem, encodes the reply. Nothing else is decided here.

`Operations` is what pyfuse3 serves; `operations_wire.py` has the requests that pyfuse3 does not know, or hands on with
half of what they say. The shell counts the kernel's lookups of each inode, so that the Filesystem hears of the last
FORGET.

What pyfuse3 leaves out of a request (`wire.current()`) is read before the first await: afterwards it is another's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apollofs.blobstore import Buffer
from apollofs.fs.attributes import Attributes, Caller, OpenFlags
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.operations_wire import InterceptedOperations
from apollofs.fs.wire import Wire
from apollofs.fs.wire_constants import RELEASE_FLOCK_UNLOCK, OpenReplyFlag, SetattrValid, WriteFlag
from apollofs.fs.wire_guard import guard_operations
from apollofs.fs.wire_interrupts import Interruptible
from apollofs.fs.wire_load import pyfuse3
from apollofs.fs.wire_structs import SetattrDetails, decode_flush, decode_release, decode_setattr, decode_write
from apollofs.metadata.errors import NamespaceError, NoSuchEntry
from apollofs.metadata.records import NOW, RenameFlag, SetAttr, storable_time

MAY_WAIT = (
    "create fsync fsyncdir flush getxattr link listxattr mkdir mknod open read readlink "
    "removexattr rename rmdir setattr statfs symlink unlink"
)
"""Requests that wait for a server as a rule; a process that was killed meanwhile is let go (EINTR). lookup and getattr,
which are mostly answered from memory, do the same where they wait."""


class Operations(InterceptedOperations, pyfuse3.Operations):
    """All requests of one mount. Make it, make its Wire, then `guard` it, before pyfuse3.init()."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: Filesystem) -> None:
        super().__init__(filesystem)
        self._wire: Wire | None = None

    @property
    def kernel(self) -> KernelCache:
        """What the kernel may answer by itself."""
        return self._filesystem.kernel

    def guard(self, wire: Wire) -> None:
        """Let no handler raise anything but FUSEError, and let killed processes go."""
        self._wire = wire
        modes = dict.fromkeys(MAY_WAIT.split(), Interruptible.FATAL)
        guard_operations(self, wire.faults, wire.interrupts, modes)

    async def _interruptible(self, ctx: Any, work: Awaitable[Attributes]) -> Attributes:
        """What may wait for a server. To be called before the handler's first await."""
        assert self._wire is not None
        found: Attributes | None = None
        with self._wire.interrupts.interruptible(Wire.current_unique(), Interruptible.FATAL, ctx.pid):
            found = await work
        assert found is not None, "an interrupted block raises"
        return found

    # -- the kernel's references -------------------------------------------------------------------------------------

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        """A reply that hands the kernel one more reference to the inode."""
        self.references.add(attributes.ino)
        return entry_attributes(attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            self.references.release(ino, count)

    @contextmanager
    def _changing(self, tid: int, *directories: int) -> Iterator[None]:
        """Around a change of names that is about to be answered to a thread; the kernel has locked the directories."""
        kernel = self._filesystem.kernel
        try:
            with kernel.locked(*directories):
                yield
        except NamespaceError:
            raise
        except BaseException:
            for directory in directories:
                kernel.names_unsure(directory)
            raise
        for directory in directories:
            kernel.names_changed(directory, tid)

    # -- names -------------------------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        try:
            found = self._filesystem.cached_lookup(parent_inode, name)
            if found is None:
                with self.kernel.locked(parent_inode):
                    found = await self._interruptible(ctx, self._filesystem.lookup(parent_inode, name))
        except NoSuchEntry:
            timeout_s = self._filesystem.absent(parent_inode, name)
            if not timeout_s:
                raise
            return no_entry(timeout_s)
        self._told(found, ctx.pid)
        if found.entry_timeout_s:
            self._filesystem.kernel.answers_lookup(parent_inode, ctx.pid)
        return self._entry(found)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        with self._changing(ctx.pid, parent_inode):
            made = await self._filesystem.mknod(parent_inode, name, mode, rdev, caller_of(ctx))
        return self._entry(made)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        with self._changing(ctx.pid, parent_inode):
            made = await self._filesystem.mkdir(parent_inode, name, mode, caller_of(ctx))
        return self._entry(made)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        with self._changing(ctx.pid, parent_inode):
            made = await self._filesystem.symlink(parent_inode, name, target, caller_of(ctx))
        return self._entry(made)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        with self._changing(ctx.pid, new_parent_inode):
            made = await self._filesystem.link(inode, new_parent_inode, new_name)
        return self._entry(made)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        with self._changing(ctx.pid, parent_inode):
            await self._filesystem.unlink(parent_inode, name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        with self._changing(ctx.pid, parent_inode):
            await self._filesystem.rmdir(parent_inode, name)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        with self._changing(ctx.pid, parent_inode_old, parent_inode_new):
            await self._filesystem.rename(parent_inode_old, name_old, parent_inode_new, name_new, RenameFlag(flags))

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return await self._filesystem.readlink(inode)

    # -- attributes --------------------------------------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        found = self._filesystem.cached_getattr(inode)
        if found is None:
            found = await self._interruptible(ctx, self._filesystem.getattr(inode))
        self._told(found, ctx.pid)
        return entry_attributes(found)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        _, body = Wire.current()
        change = change_of(decode_setattr(body))
        return entry_attributes(await self._filesystem.setattr(inode, change, fh))

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        return await self._filesystem.getxattr(inode, name)

    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        return await self._filesystem.listxattr(inode)

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        await self._filesystem.removexattr(inode, name)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        found = await self._filesystem.statfs()
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = reply.f_frsize = found.block_bytes
        reply.f_blocks = found.total_bytes // found.block_bytes
        reply.f_bfree = reply.f_bavail = found.free_bytes // found.block_bytes
        reply.f_files = found.total_inodes
        reply.f_ffree = reply.f_favail = found.free_inodes
        reply.f_namemax = found.name_bytes_max
        return reply

    # -- open files --------------------------------------------------------------------------------------------------

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        unique = Wire.current_unique()
        with self._changing(ctx.pid, parent_inode):
            attributes, opened = await self._filesystem.create(parent_inode, name, mode, flags, caller_of(ctx))
        return file_info(opened, unique), self._entry(attributes)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        unique = Wire.current_unique()
        return file_info(await self._filesystem.open(inode, flags, caller_of(ctx)), unique)

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer
        return await self._filesystem.read(fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        _, body = Wire.current()
        details = decode_write(body)
        # pages that the kernel writes back later carry their own offset, whatever the descriptor's flags
        append = bool(details.open_flags & os.O_APPEND) and not details.write_flags & WriteFlag.CACHE
        kill_suid = bool(details.write_flags & WriteFlag.KILL_SUIDGID)
        return await self._filesystem.write(fh, off, buf, append=append, kill_suid=kill_suid)

    async def flush(self, fh: int) -> None:
        request, body = Wire.current()
        await self._filesystem.flush(fh, decode_flush(body).lock_owner, request.pid)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._filesystem.fsync(fh, data_only=datasync)

    async def release(self, fh: int) -> None:
        _, body = Wire.current()
        details = decode_release(body)
        flock = bool(details.release_flags & RELEASE_FLOCK_UNLOCK)
        await self._filesystem.release(fh, details.lock_owner, flock=flock)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._filesystem.fsyncdir(fh)


def caller_of(ctx: Any) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


def file_info(opened: OpenFlags, unique: int) -> pyfuse3.FileInfo:
    """The reply to the OPEN or CREATE `unique`, which is to be sent without a further await."""
    if opened.backing_id:
        Wire.open_reply(unique, OpenReplyFlag.PASSTHROUGH, opened.backing_id)
    return pyfuse3.FileInfo(fh=opened.fh, direct_io=opened.direct_io, keep_cache=opened.keep_cache)


def no_entry(timeout_s: float) -> pyfuse3.EntryAttributes:
    """The reply to a LOOKUP that there is no such name, for the kernel to keep."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = timeout_s
    return entry


def entry_attributes(a: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes as pyfuse3 sends them."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = a.ino
    entry.st_mode = a.mode
    entry.st_nlink = a.nlink
    entry.st_uid = a.uid
    entry.st_gid = a.gid
    entry.st_rdev = a.rdev
    entry.st_size = a.size_bytes
    entry.st_blocks = a.blocks
    entry.st_blksize = 4096
    entry.st_atime_ns = a.atime_ns
    entry.st_mtime_ns = a.mtime_ns
    entry.st_ctime_ns = a.ctime_ns
    entry.attr_timeout = a.attr_timeout_s
    entry.entry_timeout = a.entry_timeout_s
    return entry


def change_of(details: SetattrDetails) -> SetAttr:
    """What a SETATTR request asks for."""
    valid = details.valid
    return SetAttr(
        mode=stat.S_IMODE(details.mode) if valid & SetattrValid.MODE else None,
        uid=details.uid if valid & SetattrValid.UID else None,
        gid=details.gid if valid & SetattrValid.GID else None,
        size_bytes=details.size if valid & SetattrValid.SIZE else None,
        atime_ns=_time(valid, SetattrValid.ATIME, SetattrValid.ATIME_NOW, details.atime_ns),
        mtime_ns=_time(valid, SetattrValid.MTIME, SetattrValid.MTIME_NOW, details.mtime_ns),
        clear_suid=bool(valid & SetattrValid.KILL_SUIDGID),
    )


def _time(valid: int, given: int, now: int, time_ns: int) -> int | None:
    if valid & now:
        return NOW
    return storable_time(time_ns) if valid & given else None
