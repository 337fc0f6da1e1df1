"""Calls on inodes: lookup, attributes, extended attributes; and what the kernel is told of them, for how long.

A file that is open here is an OpenFile, shared by its handles: its inode is the newest one that was read, overlaid with
what was written here and not yet committed. If it loses its last name it becomes an orphan and goes on here alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import trio

from apollofs.fs.attributes import Attributes, Caller
from apollofs.fs.bodies import Bodies
from apollofs.fs.file_calls import FileCalls
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.errors import (
    InvalidArgument,
    NamespaceError,
    NoSuchAttribute,
    NoSuchEntry,
    NotSupported,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.namespace_reader import Cached
from apollofs.metadata.records import NOW, Inode, InodeFlag, SetAttr
from apollofs.metadata.volume import Volume

SETTABLE_FLAGS = InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY
XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
WALKS_ANEW_S, WALKS_MAX = 0.2, 64
CAPABILITY = b"security.capability"
"""The kernel asks for it before every write; file capabilities are not supported, so the answer needs no request."""


class AttributeCalls(FileCalls):
    """The part of a Filesystem that has to do with inodes."""

    def __init__(self, volume: Volume, bodies: Bodies, kernel: KernelCache) -> None:
        super().__init__(volume, bodies, kernel)
        self._seen_directories: dict[int, Inode] = {}
        """Directories that the kernel knows, as last read: what a process that is in a removed one still sees."""
        self._walked_anew: dict[int, float] = {}
        """Directories in which the kernel may have failed to enter one, until when they tell of that by being looked
        up."""

    def _seen(self, inode: Inode) -> None:
        known = self._seen_directories.get(inode.ino)
        if known is None or known.revision <= inode.revision:
            self._seen_directories[inode.ino] = inode

    def _attributes(self, inode: Inode, group: int = 0, entry: tuple[int, bytes] | None = None) -> Attributes:
        """Of an inode that was just read; of one that is open here, with what is not yet committed.

        `group`: the held group that they are in. `entry`: the name that means it, in a held group.
        """
        if inode.is_dir:
            self._seen(inode)
        file = self._bodies.find(inode.ino)
        allocated = inode.allocated_bytes
        if file is not None:
            file.adopt(inode)
            inode, allocated = file.inode, file.allocated_bytes
            if file.orphaned:
                inode = inode._replace(nlink=0)
            if file.is_dirty or file.orphaned:
                group = 0  # they change without the kernel's doing
        return Attributes(
            inode.ino,
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev,
            inode.size_bytes,
            (allocated + 511) // 512,
            inode.atime_ns,
            inode.mtime_ns,
            inode.ctime_ns,
            inode.btime_ns,
            int(inode.flags & SETTABLE_FLAGS),
            self.kernel.attributes(group, inode.ino) if group else 0.0,
            self.kernel.entry(*entry) if entry else 0.0,
        )

    async def _fresh(self, inode: Inode, since: int) -> Attributes:
        """As `_attributes`; a body that another mount has changed is taken over first, so that what is read next is
        at least as new as these attributes. `since`: `KernelPages.recalls` before they were asked for."""
        with self._bodies.held(inode.ino) as file:
            if file is not None:
                try:
                    file = await self._bodies.refresh(file, inode)
                    self._pages.refreshed(inode.ino, since)
                except StaleInode:
                    file.orphan()
                if self._pages.settle(inode.ino, file.version, file.shown):
                    await self.kernel.drop_pages((inode.ino,))
            return self._attributes(inode)

    def cached_lookup(self, parent: int, name: bytes) -> Attributes | None:
        """As `lookup`, where nobody need be asked; None: call that. NoSuchEntry where that is known."""
        if self._stale.concerns(parent):
            return None
        cached = self._volume.cached_lookup(parent, name)
        if cached is None:
            return None
        if cached.inode.is_dir:
            self._is_entered(cached.inode, parent, name)
        return self._current(cached, (parent, name))

    def _is_entered(self, inode: Inode, parent: int, name: bytes) -> None:
        """A directory was looked up. Where the kernel has it under another name, from before others moved it, it can't
        enter it amid a rename: then it walks both paths anew (ESTALE), and by then must have let go of that name."""
        now, seen = trio.current_time(), self._seen_directories.get(inode.ino)
        if self._walked_anew.pop(inode.ino, 0.0) > now:
            self.kernel.let_go_of_names()
        if seen is not None and (seen.parent, seen.name) != (parent, name):
            self._walked_anew[parent] = now + WALKS_ANEW_S
            if len(self._walked_anew) > WALKS_MAX:
                del self._walked_anew[next(iter(self._walked_anew))]

    def cached_getattr(self, ino: int) -> Attributes | None:
        """As `getattr`, where nobody need be asked; None: call that."""
        cached = self._volume.cached_getattr(ino)
        return self._current(cached) if cached is not None else None

    def _current(self, cached: Cached, entry: tuple[int, bytes] | None = None) -> Attributes | None:
        """Attributes, unless the inode is open here with an older body than these speak of."""
        file = self._bodies.find(cached.inode.ino)
        if file is not None:
            if file.orphaned or cached.inode.body_version > file.version:
                return None
            if self._pages.outdated(file.ino, file.version):
                return None
        return self._attributes(cached.inode, cached.group, entry)

    def _made(self, parent: int, name: bytes, inode: Inode) -> Attributes:
        """Of what was just entered as `name`, with how long the kernel may keep it."""
        with contextlib.suppress(NoSuchEntry):
            cached = self._volume.cached_lookup(parent, name)
            if cached is not None and cached.inode.ino == inode.ino:
                return self._current(cached, (parent, name)) or self._attributes(inode)
        return self._attributes(inode)

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """The inode that a name means. NoSuchEntry, NameTooLong."""
        found = self._stale if self._stale.concerns(parent) else self._volume
        since = self._pages.recalls
        inode = await found.lookup(parent, name)
        if inode.is_dir:
            self._is_entered(inode, parent, name)
        attributes = await self._fresh(inode, since)
        return self.cached_lookup(parent, name) or attributes

    def absent(self, parent: int, name: bytes) -> float:
        """For how many seconds the kernel may answer by itself that there is no such name."""
        return self.kernel.entry(parent, name) if self._volume.delegated_revision(parent, name) == 0 else 0.0

    async def getattr(self, ino: int) -> Attributes:
        """Newest attributes; of what has lost its name since it was opened or entered here, the last known, with nlink
        0. StaleInode for a file that has no name any more and is not open here: the kernel then walks the path anew."""
        with self._bodies.held(ino) as file:
            if file is not None and file.orphaned:
                return self._attributes(file.inode)
            since = self._pages.recalls
            try:
                inode = await self._volume.getattr(ino)
            except StaleInode:
                if file is None:
                    self._stale.refused(ino)
                    return self._removed_directory(ino)
                file.orphan()
                return self._attributes(file.inode)
        attributes = await self._fresh(inode, since)
        return self.cached_getattr(ino) or attributes

    def _removed_directory(self, ino: int) -> Attributes:
        seen = self._seen_directories.get(ino)
        if seen is None:
            raise StaleInode(f"inode {ino:#x} has no name any more")
        return self._attributes(seen._replace(nlink=0))

    @contextlib.contextmanager
    def _changing(self, *inos: int) -> Iterator[None]:
        """Around a change of inodes. If it fails, and may have happened all the same (it is applied before it waits for
        etcd, and who waits may be killed), the kernel counts on nothing that it knows of them."""
        try:
            yield
        except NamespaceError:
            raise
        except BaseException:
            self._unsure(inos)
            raise

    def _unsure(self, inos: Iterable[int]) -> None:
        with contextlib.suppress(OSError):  # the mount is ending
            for ino in inos:
                if not self.kernel.rehome(ino):
                    self._pages.spoil(ino)

    async def setattr(self, ino: int, change: SetAttr, fh: int | None = None) -> Attributes:
        """chmod, chown, utimensat, truncate: at once, for all mounts."""
        with self._changing(ino):
            with self._bodies.held(ino) as file:
                if file is not None:
                    return await self._setattr_open(file, change)
            attributes = self._attributes(await self._volume.setattr(ino, change))
        return self.cached_getattr(ino) or attributes

    async def _setattr_open(self, file: OpenFile, change: SetAttr) -> Attributes:
        if change.size_bytes is not None:
            self._pages.written(file.ino)
            with self.passing.changing(file) as file:
                await file.truncate(change)
            if file.orphaned:
                mtime_ns = NOW if change.mtime_ns is None else change.mtime_ns
                await self._change(file, replace(change, size_bytes=None, mtime_ns=mtime_ns))
            return self._attributes(file.inode)
        if change.mtime_ns is None:
            await self._change(file, change)
        else:
            async with file.expecting_mtime(time.time_ns() if change.mtime_ns == NOW else change.mtime_ns):
                await self._change(file, change)
        return self._attributes(file.inode)

    async def readlink(self, ino: int) -> bytes:
        """A symlink's target. InvalidArgument for anything else."""
        inode = await self._volume.getattr(ino)
        if not inode.is_symlink:
            raise InvalidArgument("not a symlink")
        return inode.target

    async def get_flags(self, ino: int) -> int:
        """FS_IMMUTABLE_FL and FS_APPEND_FL."""
        return (await self.getattr(ino)).flags

    async def set_flags(self, ino: int, flags: int, caller: Caller) -> None:
        """Only root may; NotSupported for other flags."""
        if flags & ~int(SETTABLE_FLAGS):
            raise NotSupported("only the immutable and the append-only flag can be set")
        if caller.uid:
            raise OperationNotPermitted("only root may change these flags")
        with self._changing(ino):
            await self._volume.setattr(ino, SetAttr(flags=InodeFlag(flags)))
        self.kernel.changed(ino)

    # -- extended attributes -----------------------------------------------------------------------------------------

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """NoSuchAttribute; NotSupported for namespaces other than user, trusted and security."""
        if name == CAPABILITY:
            raise NoSuchAttribute("file capabilities are not supported")
        _check_namespace(name)
        return await self._volume.getxattr(ino, name)

    async def setxattr(self, ino: int, name: bytes, value: bytes, flags: int) -> None:
        """`flags`: 0, XATTR_CREATE or XATTR_REPLACE."""
        _check_namespace(name)
        if name == CAPABILITY:
            raise NotSupported("file capabilities are not supported")
        if flags & ~(os.XATTR_CREATE | os.XATTR_REPLACE):
            raise InvalidArgument("unknown setxattr flags")
        create, replace_ = bool(flags & os.XATTR_CREATE), bool(flags & os.XATTR_REPLACE)
        with self._changing(ino):
            await self._volume.setxattr(ino, name, value, create=create, replace=replace_)
        self.kernel.changed(ino)

    async def listxattr(self, ino: int) -> tuple[bytes, ...]:
        return await self._volume.listxattr(ino)

    async def removexattr(self, ino: int, name: bytes) -> None:
        _check_namespace(name)
        with self._changing(ino):
            await self._volume.removexattr(ino, name)
        self.kernel.changed(ino)


def _check_namespace(name: bytes) -> None:
    if not name.startswith(XATTR_NAMESPACES):
        raise NotSupported("extended attributes are of the namespaces user, trusted and security")
