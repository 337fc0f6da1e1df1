"""Filesystem: POSIX semantics over a Volume and its Bodies, with no kernel and no FUSE library.

The kernel above does path walking, "." and "..", umask and permission checks (default_permissions). Errors are
exceptions of the metadata, blobstore and fs trees; `errno_map.py` turns them into errno.

Here are names and directories; `attribute_calls.py` has what is called on inodes, `file_calls.py` on open files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncIterator

import trio

from apollofs.fs.attribute_calls import AttributeCalls
from apollofs.fs.attributes import Attributes, Caller, FilesystemStatistics, OpenFlags
from apollofs.fs.blobs import OpenStore
from apollofs.fs.bodies import Bodies, open_bodies
from apollofs.fs.config import BodyConfig
from apollofs.fs.directories import Directories, Entries, OpenedDirectory
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.leftovers import settle
from apollofs.metadata.errors import (
    EntryExists,
    NamespaceError,
    NoSuchEntry,
    StaleInode,
)
from apollofs.metadata.records import (
    NAME_BYTES_MAX,
    ROOT_INO,
    DirectoryEntry,
    Inode,
    Owner,
    RenameFlag,
    Usage,
)
from apollofs.metadata.volume import Volume

CAPACITY_BYTES = 1 << 50
CAPACITY_INODES = 1 << 40
"""What statfs says there is in all: object stores have no end that could be asked for."""
USAGE_FOR_S = 1.0


class Filesystem(AttributeCalls):
    """Made by `open_filesystem`. `caller` is who asks; `fh` numbers come from open, create and opendir."""

    def __init__(self, volume: Volume, bodies: Bodies, kernel: KernelCache) -> None:
        super().__init__(volume, bodies, kernel)
        self._directories = Directories(volume, kernel, self._parent_of)
        self._usage: tuple[float, Usage] | None = None
        self._unknown: set[int] = set()
        """Inodes that are open here though the kernel has forgotten them."""
        bodies.forgotten = self._closed

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
        with self._changing(ino):
            inode = await self._volume.link(ino, new_parent, new_name)
        await self.kernel.moved(ino)  # that is one of its own from now on
        return self._made(new_parent, new_name, inode)

    async def unlink(self, parent: int, name: bytes) -> None:
        self._check_orphaned(await self._volume.unlink(parent, name))
        self.kernel.gone(parent, name)

    async def rmdir(self, parent: int, name: bytes) -> None:
        await self._volume.rmdir(parent, name)
        self.kernel.gone(parent, name)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: RenameFlag) -> None:
        places = (parent, name), (new_parent, new_name)
        concerned = self._meant(*places)
        try:
            done = await self._volume.rename(parent, name, new_parent, new_name, flags)
        except NamespaceError:
            raise
        except BaseException:
            self._meant(*places)  # finds them where they are now
            self._unsure(concerned)
            raise
        if done.replaced is not None:
            self._check_orphaned(done.replaced)
        exchanged = done.replaced if flags & RenameFlag.EXCHANGE else None
        for inode in filter(None, (done.moved, exchanged)):
            if inode.ino in self._seen_directories:
                self._seen(inode)  # the kernel knows
            await self.kernel.moved(inode.ino)
        # the kernel moves its entries too, as soon as it hears
        self.kernel.renamed(parent, name, new_parent, new_name)
        if exchanged is not None:
            self.kernel.renamed(new_parent, new_name, parent, name)
        elif (parent, name) != (new_parent, new_name):
            self.kernel.gone(parent, name)

    def _meant(self, *places: tuple[int, bytes]) -> list[int]:
        """The inodes that names mean, as far as nobody need be asked; it is remembered where they are."""
        found = []
        for place in places:
            with contextlib.suppress(NamespaceError):
                cached = self._volume.cached_lookup(*place)
                found += [cached.inode.ino] if cached is not None else []
        return found

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
        """The kernel has forgotten the number. A file that has uncommitted bytes still needs its place."""
        self._seen_directories.pop(ino, None)
        self.kernel.forget(ino)
        if self._bodies.find(ino) is None:
            self._volume.forget(ino)
        else:
            self._unknown.add(ino)

    def _closed(self, ino: int) -> None:
        if ino in self._unknown:
            self._unknown.discard(ino)
            if not self.kernel.knows(ino):
                self._volume.forget(ino)


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
        kernel = KernelCache(
            delegations.validity_s,
            group_of=volume.group_of,
            entries=cache_entries,
            make_room=delegations.make_room,
            give_back=delegations.give_back,
        )
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
