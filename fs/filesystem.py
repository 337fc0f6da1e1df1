"""Filesystem: POSIX semantics over a Volume and its Bodies, with no kernel and no FUSE library.

Errors are exceptions of the metadata, blobstore and fs trees; `errno_map.py` turns them into errno.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import replace

from apollofs.fs.attributes import Attributes, Caller, FilesystemStatistics, OpenFlags
from apollofs.fs.blobs import OpenStore
from apollofs.fs.bodies import Bodies, open_bodies
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BadHandle
from apollofs.fs.late_errors import ErrorCursor
from apollofs.fs.open_file import OpenFile
from apollofs.fs.reader import AccessPattern
from apollofs.metadata.errors import (
    EntryExists,
    InvalidArgument,
    NoSuchAttribute,
    NotSupported,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.locks import Lock, LockKind, LockType
from apollofs.metadata.records import DirectoryEntry, Inode, InodeFlag, Owner, RenameFlag, SetAttr, Body
from apollofs.metadata.volume import Volume


class _Handle:
    def __init__(self, file, flags, caller):
        self.file = file
        self.flags = flags
        self.pid = caller.pid
        self.cursor = file.errors.cursor() if hasattr(file.errors, "cursor") else None
        self.pattern = AccessPattern()


class _Dir:
    def __init__(self, ino):
        self.ino = ino
        self.entries = []


class Filesystem:
    def __init__(self, volume: Volume, bodies: Bodies) -> None:
        self._volume = volume
        self._bodies = bodies
        self._handles = {}
        self._next = 1

    def _add(self, h):
        self._next += 1
        self._handles[self._next] = h
        return self._next

    def _attr(self, inode: Inode) -> Attributes:
        file = self._bodies.find(inode.ino)
        allocated = inode.allocated_bytes
        if file is not None:
            file.adopt(inode)
            inode = file.inode
            allocated = file.allocated_bytes
            if file.orphaned:
                inode = replace(inode, nlink=0)
        return Attributes(inode.ino, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size_bytes, (allocated + 511) // 512, inode.atime_ns, inode.mtime_ns, inode.ctime_ns, inode.btime_ns, int(inode.flags & 0x30))

    async def lookup(self, parent, name):
        return self._attr(await self._volume.lookup(parent, name))

    async def getattr(self, ino):
        file = self._bodies.find(ino)
        if file is not None and file.orphaned:
            return self._attr(file.inode)
        try:
            inode = await self._volume.getattr(ino)
        except StaleInode:
            if file is None:
                raise
            file.orphan()
            return self._attr(file.inode)
        if file is not None:
            await file.refresh(inode)
        return self._attr(inode)

    async def setattr(self, ino, change, fh=None):
        file = self._bodies.find(ino)
        if file is not None and change.size_bytes is not None:
            return self._attr(await file.truncate(change))
        if file is not None and change.mtime_ns is not None and file.is_dirty:
            await file.commit()
        return self._attr(await self._volume.setattr(ino, change))

    async def readlink(self, ino):
        return (await self._volume.getattr(ino)).target

    async def mknod(self, parent, name, mode, rdev, caller):
        return self._attr(await self._volume.mknod(parent, name, mode, rdev, Owner(caller.uid, caller.gid)))

    async def mkdir(self, parent, name, mode, caller):
        return self._attr(await self._volume.mkdir(parent, name, mode, Owner(caller.uid, caller.gid)))

    async def symlink(self, parent, name, target, caller):
        return self._attr(await self._volume.symlink(parent, name, target, Owner(caller.uid, caller.gid)))

    async def link(self, ino, new_parent, new_name):
        return self._attr(await self._volume.link(ino, new_parent, new_name))

    def _gone(self, inode):
        if inode is not None and inode.nlink == 0:
            file = self._bodies.find(inode.ino)
            if file is not None:
                file.orphan()

    async def unlink(self, parent, name):
        self._gone(await self._volume.unlink(parent, name))

    async def rmdir(self, parent, name):
        await self._volume.rmdir(parent, name)

    async def rename(self, parent, name, new_parent, new_name, flags):
        self._gone((await self._volume.rename(parent, name, new_parent, new_name, flags)).replaced)

    async def create(self, parent, name, mode, flags, caller):
        try:
            inode = await self._volume.mknod(parent, name, stat.S_IFREG | stat.S_IMODE(mode), 0, Owner(caller.uid, caller.gid))
        except EntryExists:
            if flags & os.O_EXCL:
                raise
            inode = await self._volume.lookup(parent, name)
            opened = await self.open(inode.ino, flags, caller)
            return await self.getattr(inode.ino), opened
        file = self._bodies.open_known(Body(inode))
        return self._attr(inode), OpenFlags(self._add(_Handle(file, flags, caller)))

    async def open(self, ino, flags, caller):
        file = await self._bodies.open(ino)
        if flags & os.O_TRUNC and file.size_bytes:
            await file.truncate(SetAttr(size_bytes=0))
        return OpenFlags(self._add(_Handle(file, flags, caller)), direct_io=bool(flags & os.O_DIRECT))

    async def read(self, fh, offset, size):
        h = self._handles[fh]
        return await h.file.read(offset, size, h.pattern)

    async def write(self, fh, offset, data, *, append=False, kill_suid=False):
        h = self._handles[fh]
        n = await (h.file.append(data) if append else h.file.write(offset, data))
        if h.flags & (os.O_SYNC | os.O_DSYNC):
            await h.file.commit()
        return n

    async def flush(self, fh, lock_owner, pid):
        await self._handles[fh].file.commit()

    async def fsync(self, fh, *, data_only):
        await self._handles[fh].file.commit()

    async def release(self, fh, lock_owner, *, flock):
        h = self._handles.pop(fh)
        try:
            await h.file.commit()
        finally:
            self._bodies.release(h.file)

    async def fallocate(self, fh, mode, offset, length):
        f = self._handles[fh].file
        if mode == 0:
            await f.grow(offset + length)
        elif mode == 1:
            pass
        elif mode in (3, 0x11):
            await f.punch(offset, length, keep_size=True)
        elif mode == 0x10:
            await f.punch(offset, length, keep_size=False)
        else:
            raise NotSupported("")

    async def lseek(self, fh, offset, whence):
        f = self._handles[fh].file
        return f.seek_data(offset) if whence == os.SEEK_DATA else f.seek_hole(offset)

    async def copy_file_range(self, a, ao, b, bo, length, flags):
        data = await self._handles[a].file.read(ao, min(length, 1 << 24))
        return await self._handles[b].file.write(bo, data)

    async def get_flags(self, ino):
        return int((await self._volume.getattr(ino)).flags & 0x30)

    async def set_flags(self, ino, flags, caller):
        if flags & ~0x30:
            raise NotSupported("")
        if caller.uid:
            raise OperationNotPermitted("")
        await self._volume.setattr(ino, SetAttr(flags=InodeFlag(flags)))

    async def opendir(self, ino):
        return self._add(_Dir(ino))

    async def readdir(self, fh, offset, limit):
        d = self._handles[fh]
        if offset == 0:
            d.entries = [DirectoryEntry(b".", d.ino, stat.S_IFDIR), DirectoryEntry(b"..", d.ino, stat.S_IFDIR)]
            page = await self._volume.readdir(d.ino, b"", 1000)
            d.entries += page.entries
            while page.more:
                page = await self._volume.readdir(d.ino, page.entries[-1].name, 1000, page.revision)
                d.entries += page.entries
        out = []
        for i, e in enumerate(d.entries[offset : offset + limit], offset + 1):
            out.append((i, e, self._attr(e.inode) if e.inode is not None else None))
        return out

    def listed(self, ino, parent, name):
        self._volume.remember(ino, parent, name)

    async def fsyncdir(self, fh):
        pass

    async def releasedir(self, fh):
        self._handles.pop(fh)

    async def getxattr(self, ino, name):
        if name == b"security.capability":
            raise NoSuchAttribute("")
        return await self._volume.getxattr(ino, name)

    async def setxattr(self, ino, name, value, flags):
        await self._volume.setxattr(ino, name, value, create=bool(flags & 1), replace=bool(flags & 2))

    async def listxattr(self, ino):
        return await self._volume.listxattr(ino)

    async def removexattr(self, ino, name):
        await self._volume.removexattr(ino, name)

    async def setlk(self, ino, kind, owner, start, end, type_, pid, *, wait):
        if type_ is None:
            await self._volume.locks.release(ino, kind, owner, start, end)
        else:
            await self._volume.locks.acquire(ino, kind, owner, start, end, type_, pid, wait=wait)

    async def getlk(self, ino, kind, owner, start, end, type_):
        return await self._volume.locks.test(ino, kind, owner, start, end, type_)

    async def statfs(self):
        u = await self._volume.usage()
        return FilesystemStatistics(4096, 1 << 50, (1 << 50) - u.bytes, 1 << 40, (1 << 40) - u.inodes, 255)

    async def sync(self):
        await self._bodies.commit_all()

    def forget(self, ino):
        if self._bodies.find(ino) is None:
            self._volume.forget(ino)


@contextlib.asynccontextmanager
async def open_filesystem(volume: Volume, open_store: OpenStore, config: BodyConfig) -> AsyncIterator[Filesystem]:
    async with open_bodies(volume, config, open_store) as bodies:
        volume.session_lost_hooks.append(bodies.session_lost)
        yield Filesystem(volume, bodies)
