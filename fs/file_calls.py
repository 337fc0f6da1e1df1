"""Calls on open files: read, write, flush, fsync, allocation, holes, copies, locks.

Nothing here decides what a body is; that is `open_file.py`. What is decided here is which calls commit, and who hears
of an error.
"""

from __future__ import annotations

import os

import trio

from apollofs.blobstore import Buffer
from apollofs.fs.attributes import Caller, OpenFlags
from apollofs.fs.bodies import Bodies
from apollofs.fs.cache_orders import CacheOrders
from apollofs.fs.copying import copy_range
from apollofs.fs.directory import DirectoryHandle
from apollofs.fs.errors import BodyLost
from apollofs.fs.following import Following
from apollofs.fs.handles import FileHandle, HandleTable, closes_for_opener
from apollofs.fs.images import Image
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.open_file import OpenFile
from apollofs.fs.orphans import changed_here
from apollofs.fs.page_table import PageWatch, Unwatched
from apollofs.fs.passing import Passing
from apollofs.fs.stale_opens import StaleOpens
from apollofs.metadata.errors import (
    FileTooLarge,
    InvalidArgument,
    NotSupported,
    OperationNotPermitted,
    Sealed,
    SessionLost,
    StaleInode,
)
from apollofs.metadata.locks import RANGE_END, Lock, LockKind, LockType
from apollofs.metadata.records import FILE_BYTES_MAX, Body, Inode, InodeFlag, SetAttr, without_suid
from apollofs.metadata.volume import Volume

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10
PAST_PAGES = os.O_APPEND | os.O_SYNC | os.O_DSYNC


class FileCalls:
    """The half of a Filesystem that has to do with open files."""

    def __init__(self, volume: Volume, bodies: Bodies, kernel: KernelCache) -> None:
        self.kernel = kernel
        """What the kernel may keep: asked wherever attributes are made that are replied without a further await."""
        self.maps_direct = False
        """Whether the kernel can map what is opened past its page cache (Linux 6.6)."""
        self._pages = kernel.pages
        self._volume = volume
        self._bodies = bodies
        self.passing = Passing(bodies, self._replaced)
        """Which opens the kernel serves by itself."""
        self._stale = StaleOpens(volume, bodies)
        self.following = Following(volume, bodies, self.passing)
        self._handles: HandleTable[FileHandle] = HandleTable()
        self._lock_owners: dict[int, set[tuple[LockKind, int]]] = {}
        """By inode: who holds locks here."""
        self.page_watch: PageWatch = Unwatched()
        """Is told of every open file, whose pages the kernel may have until the handle is released."""

    # -- open and close ----------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, caller: Caller) -> OpenFlags:
        """Open an existing file; `flags` are open(2)'s. The newest body is read: one request.

        Raises Sealed, OperationNotPermitted where the inode is immutable or append-only, InvalidArgument for what is no
        regular file, StaleInode if it has no name any more and is not open here.
        """
        file = await self._open_newest(ino)
        try:
            if not file.inode.is_file:
                raise InvalidArgument("only a regular file has bytes")
            _check_guards(file.inode, flags)
            if flags & os.O_TRUNC:
                self._pages.written(ino)
                with self.passing.changing(file) as changed:
                    await changed.truncate(SetAttr(size_bytes=0))
            image = await self.passing.image_for(self._now(file), flags)
        except BaseException:
            self._bodies.release(self._now(file))
            raise
        file = self._now(file)
        if flags & os.O_ACCMODE != os.O_WRONLY:
            self._bodies.will_read(file)
        return self._opened(file, flags, caller, image=image)

    async def _open_newest(self, ino: int) -> OpenFile:
        await self._bodies.let_close(ino)
        file = self._bodies.find(ino)
        if file is None or not file.orphaned:
            try:
                return await self._bodies.open(ino)
            except StaleInode:
                file = self._bodies.find(ino)
                if file is None:
                    self._stale.refused(ino)
                    raise
                file.orphan()
        return self._bodies.open_known(Body(file.inode))

    def opened_new(self, inode: Inode, flags: int, caller: Caller, directory: int) -> OpenFlags:
        """A handle for a file that was just created in `directory`. No request."""
        return self._opened(self._bodies.open_known(Body(inode)), flags, caller, directory)

    def _opened(
        self, file: OpenFile, flags: int, caller: Caller, directory: int = 0, image: Image | None = None
    ) -> OpenFlags:
        try:
            served = self.passing.open(file, flags, directory, image)
        except BaseException:
            self._bodies.release(self._now(file))
            raise
        file, passing = served.file, bool(served.backing_id)
        watched = self.page_watch.add(file.ino)
        direct = served.direct if passing else self._is_direct(file, flags) or not watched
        cursor = file.errors.cursor()
        handle = FileHandle(
            file,
            flags,
            caller.pid,
            cursor,
            self._volume.losses,
            direct=direct,
            watched=watched,
            passing=passing,
            directory=directory,
        )
        keep = self._pages.opened(file.ino, file.version) and not passing
        return OpenFlags(self._handles.add(handle), direct, keep, served.backing_id)

    def _now(self, file: OpenFile) -> OpenFile:
        """The file as it is open now: while somebody waited, another object may have been made of it."""
        return self._bodies.find(file.ino) or file

    def _replaced(self, before: OpenFile, after: OpenFile) -> None:
        for handle in self._handles.all():
            if handle.file is before:
                handle.file = after

    def _is_direct(self, file: OpenFile, flags: int) -> bool:
        """Whether reads and writes pass the page cache by. Also where a large file is still being fetched; where the
        kernel would put bytes into pages that they are not of (O_APPEND: the daemon chooses the offset), or keep pages
        locked while a commit waits (O_SYNC)."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if self.maps_direct and not writes and self._bodies.reader.prefers_direct(file.body):
            return True
        return bool(flags & os.O_DIRECT or (self.maps_direct and writes and flags & PAST_PAGES))

    @property
    def cache_orders(self) -> CacheOrders:
        """What a person may ask of the cache."""
        return self._bodies.orders

    def open_inodes(self) -> list[int]:
        """Those whose pages processes of this host may be reading."""
        return self._bodies.inodes

    async def flush(self, fh: int, lock_owner: int, pid: int) -> None:
        """One close(2): what was written is committed if the opener closes; then the owner's POSIX locks end.

        In this order, as in Linux (filp_flush): who gets the lock next, on whatever mount, reads what was written
        under it.

        Raises what could not be committed, and once for each handle what was lost before.
        """
        handle = self._handles.get(fh)
        file = handle.file
        try:
            # A child's close neither commits nor takes away the error that its parent is to hear of.
            concerns = file.is_dirty or file.is_lost or file.errors.cursor().seen != handle.cursor.seen
            if concerns and closes_for_opener(handle.opener, pid):
                await self._commit(handle)
            if handle.may_write:
                self._report_losses(handle)
                file.closing_since_s = trio.current_time()
        finally:
            await self._unlock_owner(file.ino, LockKind.POSIX, lock_owner)

    async def _commit(self, handle: FileHandle) -> None:
        before = handle.file.version
        await handle.file.commit(handle.cursor)
        self._pages.committed(handle.file.ino, before, handle.file.version)

    async def fsync(self, fh: int, *, data_only: bool) -> None:
        """On return what was written before is in the store and in etcd, and so are all names that were answered
        before. Raises as `flush`."""
        handle = self._handles.get(fh)
        await self._commit(handle)
        await self.settle_names(handle)

    async def settle_names(self, handle: FileHandle | DirectoryHandle) -> None:
        """On return all names that were answered before are in etcd. Raises SessionLost or BodyLost, once for each
        handle, if some are lost."""
        try:
            await self._volume.settle()
        except SessionLost:
            handle.losses = self._volume.losses
            raise
        self._report_losses(handle)

    def _report_losses(self, handle: FileHandle | DirectoryHandle) -> None:
        """Raises BodyLost, once for each handle, when names that were answered are gone with a session."""
        if handle.losses != self._volume.losses:
            handle.losses = self._volume.losses
            raise BodyLost("names and attributes that had been answered are gone with the mount's session")

    async def release(self, fh: int, lock_owner: int, *, flock: bool) -> None:
        """The last close: commit what came after the flush (mapped pages), end the flock, drop the handle.

        Nobody hears of an error now; what could not be committed is tried again in the background.
        """
        handle = self._handles.pop(fh)
        try:
            try:
                if handle.file.is_dirty:
                    await self._commit(handle)
            finally:
                if flock:
                    await self._unlock_owner(handle.file.ino, LockKind.FLOCK, lock_owner)
        finally:
            self.passing.close(handle.file, passing=handle.passing, directory=handle.directory)
            self._bodies.release(handle.file)
            if handle.watched:
                self.page_watch.remove(handle.file.ino)

    # -- bytes -------------------------------------------------------------------------------------------------------

    async def read(self, fh: int, offset: int, size: int) -> Buffer:
        """Bytes `[offset, offset + size)`; fewer only at the end of the file."""
        handle = self._handles.get(fh)
        file = handle.file
        self.kernel.reading(file.ino)
        if handle.direct or self._pages.asks(file.ino) or file.is_unsure or not self._volume.proven:
            # Nobody has asked for attributes before this read, as the kernel does before a read(2) of cached pages.
            # For pages of a mapping it does not either, and those must not be older than the lease.
            await self._refresh(file)
            file = handle.file
        before, shown = file.version, file.shown
        data = await file.read(offset, size, handle.pattern)
        self.kernel.reads(file.ino, before, shown)
        if file.version != before:
            self.kernel.reads(file.ino, file.version, file.shown)
        return data

    async def _refresh(self, file: OpenFile) -> None:
        if file.orphaned:
            return
        since = self._pages.recalls
        try:
            await self._bodies.refresh(file, await self._volume.getattr(file.ino))
            self._pages.refreshed(file.ino, since)
        except StaleInode:
            file.orphan()

    async def write(self, fh: int, offset: int, data: bytes, *, append: bool = False, kill_suid: bool = False) -> int:
        """Stage `data`; the number of bytes written. `append`: at the end of the file, whatever `offset` says.

        Raises FileTooLarge, StagingFull, BodyLost; O_SYNC and O_DSYNC commit, and raise as `fsync`.
        """
        handle = self._handles.get(fh)
        file = handle.file
        if kill_suid and without_suid(file.inode.mode) != file.inode.mode:
            await self._change(file, SetAttr(clear_suid=True))
        self._pages.written(file.ino)
        if append:
            written = await file.append(data, handle.cursor)
        else:
            written = await file.write(offset, data, handle.cursor)
        if handle.is_synchronous:
            await self._commit(handle)
        return written

    async def _change(self, file: OpenFile, change: SetAttr) -> None:
        """Attributes other than the size: for all mounts, or of an orphan for this one."""
        if not file.orphaned:
            try:
                file.adopt(await self._volume.setattr(file.ino, change))
                return
            except StaleInode:
                file.orphan()
        file.adopt(changed_here(file.inode, change))

    # -- ranges ------------------------------------------------------------------------------------------------------

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Extend (mode 0), punch (PUNCH_HOLE|KEEP_SIZE) or zero a range (ZERO_RANGE, with or without KEEP_SIZE).

        Space is not reserved: the store has no such thing. What is zeroed becomes a hole. NotSupported for other modes.
        """
        handle = self._handles.get(fh)
        if offset < 0 or length <= 0:
            raise InvalidArgument("an empty or negative range")
        if offset + length > FILE_BYTES_MAX:
            raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        keep_size = bool(mode & FALLOC_KEEP_SIZE)
        self._pages.written(handle.file.ino)
        if mode in (FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE):
            await handle.file.punch(offset, length, keep_size=keep_size, cursor=handle.cursor)
        elif mode == 0:
            # another mount may have cut the file since it was last read
            await self._refresh(handle.file)
            if offset + length > handle.file.size_bytes:
                await handle.file.grow(offset + length, handle.cursor)
        elif mode != FALLOC_KEEP_SIZE:
            raise NotSupported(f"fallocate mode {mode:#x}")

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE. NoDataThere (ENXIO) at or past the end."""
        file = self._handles.get(fh).file
        await self._refresh(file)
        if whence == os.SEEK_DATA:
            return await file.seek_data(offset)
        if whence == os.SEEK_HOLE:
            return await file.seek_hole(offset)
        raise InvalidArgument("only SEEK_DATA and SEEK_HOLE are asked of a filesystem")

    async def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        """Copy within this mount (`copying.py`); how many bytes, perhaps fewer than `length`."""
        source, target = self._handles.get(fh_in), self._handles.get(fh_out)
        if flags or offset_in < 0 or offset_out < 0:
            raise InvalidArgument("copy_file_range takes no flags and no negative offsets")
        await self._refresh(source.file)
        length = min(length, source.file.size_bytes - offset_in)
        if length <= 0:
            return 0
        if offset_out + length > FILE_BYTES_MAX:
            raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        if source.file is target.file and abs(offset_in - offset_out) < length:
            raise InvalidArgument("the ranges overlap")
        ino, before = target.file.ino, target.file.version
        self._pages.written(ino)
        copied = await copy_range(source, offset_in, target, offset_out, length, self._refresh)
        if self._bodies.opens(ino) > 1:
            # others may have it mapped, and nothing else would tell them
            await self._refresh(target.file)
        self._pages.committed(ino, before, target.file.version)
        return copied

    # -- locks -------------------------------------------------------------------------------------------------------

    async def setlk(
        self,
        ino: int,
        kind: LockKind,
        owner: int,
        start: int,
        end: int,
        type_: LockType | None,
        pid: int,
        *,
        wait: bool,
    ) -> None:
        """Take a lock; `type_` None gives it back. Raises LockConflict, LockDeadlock, TooManyLocks.

        Before a lock ends or becomes shared, what was written under it is committed: who gets it next, on whatever
        mount, reads that. If it can't be, the lock ends all the same, the error is raised, and the bytes stay dirty.
        """
        if type_ is None:
            try:
                await self._commit_under_lock(ino, kind, owner)
            finally:
                await self._volume.locks.release(ino, kind, owner, start, end)
                if not self._volume.locks.holds(ino, kind, owner):
                    self._forget_owner(ino, kind, owner)
            return
        if type_ is LockType.SHARED:
            await self._commit_under_lock(ino, kind, owner)
        try:
            await self._volume.locks.acquire(ino, kind, owner, start, end, type_, pid, wait=wait)
        finally:
            # who was refused has nothing to lose; a conversion that failed may have lost what was held
            if self._volume.locks.holds(ino, kind, owner):
                self._lock_owners.setdefault(ino, set()).add((kind, owner))
            else:
                self._forget_owner(ino, kind, owner)

    async def _commit_under_lock(self, ino: int, kind: LockKind, owner: int) -> None:
        if not self._volume.locks.holds(ino, kind, owner):
            return
        file = self._bodies.find(ino)
        if file is not None and file.is_dirty:
            await file.commit()
        await self._volume.settle()

    async def getlk(self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType) -> Lock | None:
        """The first lock that would stand in the way."""
        return await self._volume.locks.test(ino, kind, owner, start, end, type_)

    async def _unlock_owner(self, ino: int, kind: LockKind, owner: int) -> None:
        if (kind, owner) not in self._lock_owners.get(ino, ()):
            return
        try:
            await self._volume.locks.release(ino, kind, owner, 0, RANGE_END)
        finally:
            # whatever came of it, the owner holds nothing any more
            self._forget_owner(ino, kind, owner)

    def _forget_owner(self, ino: int, kind: LockKind, owner: int) -> None:
        owners = self._lock_owners.get(ino, set())
        owners.discard((kind, owner))
        if not owners:
            self._lock_owners.pop(ino, None)

    def session_lost(self) -> None:
        """Uncommitted bytes and locks are gone; every handle concerned reports it once."""
        for dirty in self._bodies.dirty_files:
            self._pages.spoil(dirty.ino)
        self._bodies.session_lost()
        for ino in self._lock_owners:
            file = self._bodies.find(ino)
            if file is not None:
                file.errors.record(BodyLost(f"inode {ino:#x}: its lock is gone with the mount's session"))
        self._lock_owners.clear()


def _check_guards(inode: Inode, flags: int) -> None:
    """What immutable, append-only and sealed files can't be opened for."""
    writes = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
    if inode.seal and writes:
        raise Sealed("the file is in a sealed tree")
    if inode.flags & InodeFlag.IMMUTABLE and writes:
        raise OperationNotPermitted("the file is immutable")
    if inode.flags & InodeFlag.APPEND_ONLY and writes and (not flags & os.O_APPEND or flags & os.O_TRUNC):
        raise OperationNotPermitted("the file is append-only")
