"""Filesystem: POSIX semantics over a Volume and its Bodies, with no kernel and no FUSE library.

The kernel above does path walking, "." and "..", umask and permission checks (default_permissions). Errors are
exceptions of the metadata, blobstore and fs trees; `errno_map.py` turns them into errno.

A file that is open here is an OpenFile, shared by its handles: its inode is the newest one that was read, overlaid with
what was written here and not yet committed. If it loses its last name it becomes an orphan and goes on here alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import trio

from apollofs.fs.attributes import Attributes, Caller, FilesystemStatistics, OpenFlags
from apollofs.fs.blobs import OpenStore
from apollofs.fs.bodies import Bodies, open_bodies
from apollofs.fs.config import BodyConfig
from apollofs.fs.directories import Directories, Entries, OpenedDirectory
from apollofs.fs.file_calls import FileCalls
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.leftovers import settle
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.errors import (
    EntryExists,
    InvalidArgument,
    NoSuchAttribute,
    NoSuchEntry,
    NotSupported,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.namespace_reader import Cached
from apollofs.metadata.records import (
    NAME_BYTES_MAX,
    NOW,
    ROOT_INO,
    DirectoryEntry,
    Inode,
    InodeFlag,
    Owner,
    RenameFlag,
    SetAttr,
    Usage,
)
from apollofs.metadata.volume import Volume

SETTABLE_FLAGS = InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY
XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
CAPABILITY = b"security.capability"
"""The kernel asks for it before every write; file capabilities are not supported, so the answer needs no request."""
CAPACITY_BYTES = 1 << 50
CAPACITY_INODES = 1 << 40
"""What statfs says there is in all: object stores have no end that could be asked for."""
USAGE_FOR_S = 1.0


class Filesystem(FileCalls):
    """Made by `open_filesystem`. `caller` is who asks; `fh` numbers come from open, create and opendir."""

    def __init__(self, volume: Volume, bodies: Bodies, kernel: KernelCache) -> None:
        super().__init__(volume, bodies, kernel)
        self._directories = Directories(volume, kernel, self._parent_of)
        self._usage: tuple[float, Usage] | None = None
        self._seen_directories: dict[int, Inode] = {}
        """Directories that the kernel knows, as last read: what a process that is in a removed one still sees."""

    # -- attributes --------------------------------------------------------------------------------------------------

    def _attributes(self, inode: Inode, group: int = 0, entry: tuple[int, bytes] | None = None) -> Attributes:
        """Of an inode that was just read; of one that is open here, with what is not yet committed.

        `group`: the held group that they are in. `entry`: the name that means it, in a held group.
        """
        if inode.is_dir:
            self._seen_directories[inode.ino] = inode
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

    async def _fresh(self, inode: Inode) -> Attributes:
        """As `_attributes`; a body that another mount has changed is taken over first, so that what is read next is
        at least as new as these attributes."""
        with self._bodies.held(inode.ino) as file:
            if file is not None:
                try:
                    file = await self._bodies.refresh(file, inode)
                    self._pages.refreshed(inode.ino)
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
        return self._current(cached, (parent, name)) if cached is not None else None

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
        attributes = await self._fresh(await found.lookup(parent, name))
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
            try:
                inode = await self._volume.getattr(ino)
            except StaleInode:
                if file is None:
                    self._stale.refused(ino)
                    return self._removed_directory(ino)
                file.orphan()
                return self._attributes(file.inode)
        attributes = await self._fresh(inode)
        return self.cached_getattr(ino) or attributes

    def _removed_directory(self, ino: int) -> Attributes:
        seen = self._seen_directories.get(ino)
        if seen is None:
            raise StaleInode(f"inode {ino:#x} has no name any more")
        return self._attributes(seen._replace(nlink=0))

    async def setattr(self, ino: int, change: SetAttr, fh: int | None = None) -> Attributes:
        """chmod, chown, utimensat, truncate: at once, for all mounts."""
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
        await self._volume.setattr(ino, SetAttr(flags=InodeFlag(flags)))
        self.kernel.changed(ino)

    # -- names -------------------------------------------------------------------------------------------------------

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        inode = await self._volume.mknod(parent, name, mode, rdev, Owner(caller.uid, caller.gid))
        return self._made(parent, name, inode)

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        inode = await self._volume.mkdir(parent, name, mode, Owner(caller.uid, caller.gid))
        return self._made(parent, name, inode)

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        inode = await self._volume.symlink(parent, name, target, Owner(caller.uid, caller.gid))
        return self._made(parent, name, inode)

    async def link(self, ino: int, new_parent: int, new_name: bytes) -> Attributes:
        inode = await self._volume.link(ino, new_parent, new_name)
        self.kernel.changed(ino)  # its attributes are in a group of its own from now on
        return self._made(new_parent, new_name, inode)

    async def unlink(self, parent: int, name: bytes) -> None:
        self._check_orphaned(await self._volume.unlink(parent, name))
        self.kernel.gone(parent, name)

    async def rmdir(self, parent: int, name: bytes) -> None:
        await self._volume.rmdir(parent, name)
        self.kernel.gone(parent, name)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: RenameFlag) -> None:
        done = await self._volume.rename(parent, name, new_parent, new_name, flags)
        self._moved(done.moved, (parent, name), (new_parent, new_name))
        if done.replaced is not None:
            self._check_orphaned(done.replaced)
            if flags & RenameFlag.EXCHANGE:
                self._moved(done.replaced, (new_parent, new_name), (parent, name))
        if not flags & RenameFlag.EXCHANGE and (parent, name) != (new_parent, new_name):
            self.kernel.gone(parent, name)

    def _moved(self, inode: Inode, source: tuple[int, bytes], target: tuple[int, bytes]) -> None:
        """The kernel moves its entry too, as soon as it hears."""
        self.kernel.renamed(*source, *target)
        self.kernel.changed(inode.ino)

    def _check_orphaned(self, inode: Inode) -> None:
        file = self._bodies.find(inode.ino)
        if file is not None and inode.nlink == 0:
            file.orphan()

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attributes, OpenFlags]:
        """open(O_CREAT). Where another mount was faster, O_EXCL fails with EntryExists.

        Without it StaleInode is raised, not the other's file opened: the kernel asks for no permission on a file that
        it takes for new, but walks the path anew after ESTALE (do_filp_open in fs/namei.c), and then opens as usual.
        """
        try:
            inode = await self._volume.mknod(
                parent, name, stat.S_IFREG | stat.S_IMODE(mode), 0, Owner(caller.uid, caller.gid)
            )
        except EntryExists as exc:
            if flags & os.O_EXCL:
                raise
            raise StaleInode("another mount has made this name since it was looked up") from exc
        opened = self.opened_new(inode, flags, caller, parent)
        return self._made(parent, name, inode), opened

    # -- directories -------------------------------------------------------------------------------------------------

    def opendir(self, ino: int) -> OpenedDirectory:
        """No request; the first `readdir` takes the snapshot."""
        return self._directories.open(ino)

    async def readdir(self, fh: int, offset: int, limit: int) -> Entries:
        """Entries from position `offset` (0: the start, a new snapshot), each with the position after it. Empty at the
        end."""
        return await self._directories.read(fh, offset, limit)

    def cached_readdir(self, ino: int, fh: int, offset: int, limit: int) -> Entries | None:
        """As `readdir`, where nobody need be asked; None: call that. `ino` is the directory's."""
        seen = self._seen_directories.get(ino)
        return self._directories.read_now(fh, offset, limit, seen.parent if seen is not None else None)

    def listed(self, directory: int, entry: DirectoryEntry) -> Attributes | None:
        """Attributes of an entry of a listing, which may be older than what is known by now; None where the kernel has
        to ask for them, if it wants them."""
        try:
            cached = self._volume.cached_entry(directory, entry)
        except NoSuchEntry:
            return None
        if cached is not None:
            return self._current(cached, (directory, entry.name))
        if entry.inode is None or self._bodies.find(entry.ino) is not None:
            return None
        return self._attributes(entry.inode)

    async def _parent_of(self, ino: int) -> int:
        """Where a directory was when it was last read, which is no longer ago than the walk to it."""
        seen = self._seen_directories.get(ino)
        if seen is not None:
            return seen.parent
        try:
            return (await self._volume.getattr(ino)).parent
        except StaleInode:
            return ROOT_INO  # removed while open: it has no entries

    def remember(self, directory: int, entry: DirectoryEntry) -> None:
        """The kernel was given an entry with its attributes, and may ask for it by number from now on."""
        if entry.inode is not None:
            self._volume.remember(entry.ino, directory, entry.name)

    async def fsyncdir(self, fh: int) -> None:
        """On return all names that were answered before are in etcd. Raises BodyLost if some are lost, SessionLost."""
        await self.settle_names(self._directories.get(fh))

    def releasedir(self, fh: int) -> None:
        self._directories.release(fh)

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
        await self._volume.setxattr(ino, name, value, create=create, replace=replace_)
        self.kernel.changed(ino)

    async def listxattr(self, ino: int) -> tuple[bytes, ...]:
        return await self._volume.listxattr(ino)

    async def removexattr(self, ino: int, name: bytes) -> None:
        _check_namespace(name)
        await self._volume.removexattr(ino, name)
        self.kernel.changed(ino)

    # -- the whole ---------------------------------------------------------------------------------------------------

    async def statfs(self) -> FilesystemStatistics:
        """An estimate: asked of the store once a second at most, and other mounts tell with some delay."""
        now = trio.current_time()
        if self._usage is None or now - self._usage[0] > USAGE_FOR_S:
            self._usage = (now, await self._volume.usage())
        used = self._usage[1]
        return FilesystemStatistics(
            block_bytes=4096,
            total_bytes=CAPACITY_BYTES,
            free_bytes=max(CAPACITY_BYTES - used.bytes, 0),
            total_inodes=CAPACITY_INODES,
            free_inodes=max(CAPACITY_INODES - used.inodes, 0),
            name_bytes_max=NAME_BYTES_MAX,
        )

    def statistics(self) -> dict[str, dict[str, float]]:
        """Counters for `status`, by what they are of."""
        return {
            "kernel_cache": self.kernel.statistics(),
            "bodies": {**self._bodies.statistics(), **self.passing.modes.statistics()},
        }

    async def sync(self) -> None:
        """Commit all that was written and answered (umount). Raises the first error, after all files were tried."""
        await self._bodies.commit_all()
        await self._volume.settle()

    def forget(self, ino: int) -> None:
        """The kernel has forgotten the number. A file with uncommitted bytes still needs its place."""
        self._seen_directories.pop(ino, None)
        self.kernel.forget(ino)
        if self._bodies.find(ino) is None:
            self._volume.forget(ino)


def _check_namespace(name: bytes) -> None:
    if not name.startswith(XATTR_NAMESPACES):
        raise NotSupported("extended attributes are of the namespaces user, trusted and security")


@contextlib.asynccontextmanager
async def open_filesystem(
    volume: Volume, open_store: OpenStore, config: BodyConfig, *, cache_entries: bool = True
) -> AsyncIterator[Filesystem]:
    """The filesystem of a mounted volume; `open_store` opens a site's store by the site's id. The kernel may keep what
    is delegated; without `cache_entries` only attributes.

    At the end nothing is committed any more: `sync` comes before. Raises CacheDirectoryUnusable.
    """
    async with open_bodies(volume, config, open_store, volume.placement) as bodies:
        delegations = volume.delegations
        kernel = KernelCache(delegations.validity_s, entries=cache_entries, make_room=delegations.make_room)
        delegations.put_above(kernel)
        filesystem = Filesystem(volume, bodies, kernel)
        volume.session_lost_hooks.append(filesystem.session_lost)
        volume.uses.in_use = bodies.in_use
        volume.uses.blobs_in_use = lambda: bodies.writer.packer.blobs_in_use
        async with trio.open_nursery() as nursery:
            nursery.start_soon(filesystem.passing.upload_early)
            nursery.start_soon(filesystem.following.serve)
            nursery.start_soon(settle, os.fspath(config.cache_dir), volume)
            try:
                yield filesystem
            finally:
                volume.session_lost_hooks.remove(filesystem.session_lost)
                nursery.cancel_scope.cancel()
