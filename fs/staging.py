"""Staging: where bytes are kept on this host from write(2) until they are committed.

    <cache_dir>/staging/.lock               held while a directory is made or looked through
    <cache_dir>/staging/<mount>/.lock       held by a running mount; a directory without a holder is dead, and removed
    <cache_dir>/staging/<mount>/<ino>-<n>   what is staged of one open file
    <cache_dir>/staging/<mount>/<ino>-<n>.copy      what is written by passthrough (`working_copy.py`)

A staging file is a log: new bytes go to its end, a `SegmentMap` says where each byte of the file is. So what a commit
has taken a snapshot of stays as it is while the file is written on, and needs no copy. Rules:
1. While a *pin* is held (a snapshot being uploaded, a read in a thread) no staged byte is overwritten or freed.
2. Without pins, small writes into one staged stretch overwrite it, and what is no longer referred to is freed.
3. The first bytes of a file are kept in memory, bounded for the mount, so that small files never touch the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import trio

from apollofs.fs import local_io
from apollofs.fs.errors import CacheDirectoryUnusable, StagingFailed, StagingFull
from apollofs.fs.leftovers import Place, note_place, rescue
from apollofs.fs.local_io import INLINE_BYTES_MAX
from apollofs.fs.mountinfo import mount_of
from apollofs.fs.segments import Segment, SegmentMap
from apollofs.fs.working_copy import WorkingCopy, has_fine_times, staging_error

log = logging.getLogger(__name__)
MEMORY_BYTES_MAX = 256 << 10
"""Of one file, before it goes to disk."""
MEMORY_BYTES_OF_MOUNT_MAX = 32 << 20
RESERVE_BYTES = 16 << 20
"""The disk's free space is looked at once for so many bytes."""
COPY_FREE_BYTES_MIN = 1 << 30
"""With less room on the disk, writes come through the daemon, which can slow them down."""
THREADS = 8

MakeRoom = Callable[[int], Awaitable[None]]
"""Asks whoever else uses the disk to give up so many bytes."""


class StagingArea:
    """One mount's directory of staging files. Made by `open_staging`."""

    def __init__(self, directory: str, lock: int, disk_free_bytes_min: int) -> None:
        """`lock`: the descriptor that says that the directory's mount is alive."""
        self.directory = directory
        self.lock = lock
        self.limiter = trio.CapacityLimiter(THREADS)
        self.make_room: MakeRoom | None = None
        self.fine_times = has_fine_times(directory)
        lies_on = mount_of(os.path.realpath(directory))
        self._in_memory = lies_on is not None and lies_on.fstype in ("tmpfs", "ramfs")
        self._disk_free_bytes_min = disk_free_bytes_min
        self._reserved = 0
        self._memory_left = MEMORY_BYTES_OF_MOUNT_MAX
        self._counter = itertools.count()

    def open_file(self, ino: int) -> StagingFile:
        return StagingFile(self, f"{ino:016x}-{next(self._counter)}")

    @property
    def has_room(self) -> bool:
        """Whether a file may be written without the daemon's seeing how much."""
        return not self._in_memory and self._free_bytes() > COPY_FREE_BYTES_MIN

    async def keep_room(self) -> None:
        """While files grow unseen: have the cache give way before the disk is full. Raises nothing."""
        try:
            lacking = COPY_FREE_BYTES_MIN - self._free_bytes()
        except StagingFailed:
            return
        if lacking > 0 and self.make_room is not None:
            await self.make_room(lacking)

    def open_copy(self, ino: int, place: Place | None = None, image: str | None = None) -> WorkingCopy:
        """A local file for an inode, of the name `place`, that is to be written by passthrough: empty, or the file
        `image`, which must have no other name from now on.

        Raises StagingFull, StagingFailed.
        """
        path = os.path.join(self.directory, f"{ino:016x}-{next(self._counter)}.copy")
        try:
            if image is not None:
                os.link(image, path)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if image is None else 0), 0o600)
        except OSError as exc:
            raise staging_error(exc) from exc
        note_place(fd, place)
        return WorkingCopy(path, fd, self.limiter, fine_times=self.fine_times)

    def take_memory(self, size: int) -> bool:
        """Whether a file may keep `size` more bytes in memory; give back with a negative size."""
        if size > self._memory_left:
            return False
        self._memory_left -= size
        return True

    async def reserve(self, size: int) -> None:
        """See that the disk has room for `size` more bytes. A checkpoint only if room must be made.

        Raises StagingFull, StagingFailed.
        """
        if size <= self._reserved:
            self._reserved -= size
            return
        free = self._free_bytes()
        if free < size and self.make_room is not None:
            await self.make_room(size + RESERVE_BYTES - free)
            free = self._free_bytes()
        if free < size:
            raise StagingFull(f"the disk of {self.directory} has no room for {size} more bytes")
        self._reserved = min(free - size, RESERVE_BYTES)

    def _restore(self) -> None:
        """Somebody has emptied the cache directory: make it anew. What is open already goes on. Raises OSError."""
        os.makedirs(self.directory, mode=0o700)
        os.close(self.lock)
        self.lock = _locked(self.directory)

    def _free_bytes(self) -> int:
        try:
            if not os.path.isdir(self.directory):
                self._restore()
            status = os.statvfs(self.directory)
        except OSError as exc:
            raise StagingFailed(f"the staging directory can't be used: {exc}") from exc
        return status.f_bavail * status.f_frsize - self._disk_free_bytes_min


class StagingFile:
    """The dirty bytes of one open file.

    `write` and `append` must not run twice at once (the open file's write lock); everything else may run beside it.
    They raise StagingFull, StagingFailed; a write that raised has changed nothing that a later read sees.
    """

    def __init__(self, area: StagingArea, name: str) -> None:
        self.map = SegmentMap()
        self.on_change: Callable[[int, int], None] = lambda at, length: None
        """Told (place, length) before staged bytes are overwritten or given up."""
        self._area = area
        self._path = os.path.join(area.directory, name)
        self._memory: bytearray | None = bytearray()
        self._fd = -1
        self._tail = 0
        self._pins = 0
        self._garbage: list[Segment] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def disk_bytes(self) -> int:
        """The length of the log, if it is on the disk."""
        return self._tail if self._fd >= 0 else 0

    def duplicate(self) -> int:
        """A descriptor of the log, which is on the disk: to be closed by the caller. Raises StagingFailed."""
        try:
            return os.dup(self._fd)
        except OSError as exc:
            raise staging_error(exc) from exc

    # -- writing -----------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes) -> None:
        """Stage `data` as file bytes from `offset`. No checkpoint if it is small."""
        if not data:
            return
        place = self._overwritable(offset, len(data))
        if place is not None:
            self._overwrite(place, data)
            return
        await self.append(data, lambda: offset)

    async def append(self, data: bytes, where: Callable[[], int]) -> None:
        """Stage `data` as file bytes from `where()`, which is asked when the bytes are in place."""
        if not data:
            return
        with self.pinned():
            place = await self._extend(len(data))
            await self._log(place, data)
            self._free(self.map.put(Segment(where(), len(data), place)))

    def _overwritable(self, offset: int, length: int) -> int | None:
        """Where the range is staged, if it is in one piece and may be changed in place."""
        if self._pins or length > INLINE_BYTES_MAX:
            return None
        found = self.map.within(offset, length)
        return found[0].at if len(found) == 1 and found[0].length == length else None

    def _overwrite(self, place: int, data: bytes) -> None:
        self.on_change(place, len(data))
        if self._memory is not None:
            self._memory[place : place + len(data)] = data
            return
        try:
            local_io.write_fully(self._fd, place, data)
        except OSError as exc:
            raise staging_error(exc) from exc

    async def _extend(self, length: int) -> int:
        """Room at the end of the log: where."""
        if not self._stays_in_memory(length):
            await self._area.reserve(length)
            await self._spill()
        place = self._tail
        self._tail += length
        return place

    async def _log(self, place: int, data: bytes) -> None:
        if self._memory is not None:
            assert place == len(self._memory)
            self._memory += data
            return
        try:
            await local_io.write(self._fd, place, data, self._area.limiter)
        except OSError as exc:
            raise staging_error(exc) from exc

    def _stays_in_memory(self, growth: int) -> bool:
        if self._memory is None or self._tail + growth > MEMORY_BYTES_MAX:
            return False
        return self._area.take_memory(growth)

    async def _spill(self) -> None:
        """From memory to a file on disk."""
        if self._memory is None:
            return
        await self._area.reserve(len(self._memory))
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                local_io.write_fully(fd, 0, self._memory)
            except BaseException:
                os.close(fd)
                os.unlink(self._path)
                raise
        except OSError as exc:
            raise staging_error(exc) from exc
        self._fd = fd
        self._release_memory()

    def _release_memory(self) -> None:
        if self._memory is not None:
            self._area.take_memory(-self._tail)
            self._memory = None

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, segment: Segment) -> bytes:
        """The staged bytes of a segment. A pin must be held if the segment may be replaced meanwhile."""
        if self._memory is not None:
            return bytes(self._memory[segment.at : segment.at + segment.length])
        try:
            data = await local_io.read(self._fd, segment.at, segment.length, self._area.limiter)
        except OSError as exc:
            raise staging_error(exc) from exc
        if len(data) != segment.length:
            raise StagingFailed(f"the staging file {self._path} is shorter than what was written to it")
        return data

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """While this is held every byte staged at its start stays where and what it is."""
        self.pin()
        try:
            yield
        finally:
            self.unpin()

    def pin(self) -> None:
        self._pins += 1

    def unpin(self) -> None:
        self._pins -= 1
        assert self._pins >= 0
        if not self._pins:
            garbage, self._garbage = self._garbage, []
            self._give_back(garbage)

    # -- forgetting --------------------------------------------------------------------------------------------------

    def drop(self, start: int, end: int | None = None) -> None:
        """File bytes `[start, end)` are not dirty any more (None: to the end)."""
        self._free(self.map.drop(start, end))

    def shift(self, start: int, distance: int) -> None:
        """What is dirty at or past `start` moves by `distance` bytes."""
        self._free(self.map.shift(start, distance))

    def forget(self, committed: tuple[Segment, ...]) -> None:
        """What a snapshot held is committed: it is not dirty any more, except where it was written anew."""
        self.map.forget(committed)
        self._free(list(committed))

    def clear(self) -> None:
        self._free(self.map.clear())

    def _free(self, gone: list[Segment]) -> None:
        if self._pins:
            self._garbage += gone
        else:
            self._give_back(gone)

    def _give_back(self, gone: list[Segment]) -> None:
        """Return room to the disk; called without pins only."""
        if self._closed or not self._tail:
            return
        if not self.map:
            self._start_over()
        elif self._fd >= 0:
            for segment in gone:
                self.on_change(segment.at, segment.length)
                local_io.punch_hole(self._fd, segment.at, segment.length)

    def _start_over(self) -> None:
        """Nothing is staged: the log begins anew."""
        self.on_change(0, self._tail)
        if self._memory is not None:
            self._area.take_memory(-self._tail)
            self._memory = bytearray()
        else:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as exc:
                log.warning("a staging file can't be emptied, and goes on growing: %s", exc)
                return
        self._tail = 0

    def close(self) -> None:
        """Delete the file. Nobody may be reading or writing."""
        if self._closed:
            return
        self._closed = True
        self._release_memory()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


# -- the directory ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_staging(cache_dir: str, disk_free_bytes_min: int) -> AsyncIterator[StagingArea]:
    """This mount's staging area; removed at the end. What dead mounts left is removed at the start, but for working
    copies (`leftovers.py`).

    Raises CacheDirectoryUnusable.
    """
    root = os.path.join(cache_dir, "staging")
    try:
        directory, lock = await trio.to_thread.run_sync(_claim, root)
    except OSError as exc:
        raise CacheDirectoryUnusable(f"the cache directory {cache_dir} can't be used: {exc.strerror}") from exc
    area = StagingArea(directory, lock, disk_free_bytes_min)
    try:
        yield area
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove, directory)
        os.close(area.lock)


def _claim(root: str) -> tuple[str, int]:
    """Remove the directories of dead mounts, make one for this mount and lock it: (directory, lock's descriptor)."""
    os.makedirs(root, mode=0o700, exist_ok=True)
    guard = _lock_file(root)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for entry in os.scandir(root):
            if entry.is_dir(follow_symlinks=False):
                _remove_if_dead(entry.path)
        directory = os.path.join(root, secrets.token_hex(8))
        os.mkdir(directory, 0o700)
        return directory, _locked(directory)
    finally:
        os.close(guard)


def _remove_if_dead(directory: str) -> None:
    lock = _lock_file(directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        _remove(directory)
    finally:
        os.close(lock)


def _locked(directory: str) -> int:
    lock = _lock_file(directory)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _lock_file(directory: str) -> int:
    return os.open(os.path.join(directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _remove(directory: str) -> None:
    try:
        if not os.path.isdir(directory):
            return
        rescue(directory, os.path.dirname(os.path.dirname(directory)))
    except OSError as exc:
        log.warning("what a mount has left in %s stays there: %s", directory, exc)
        return
    # What can't be removed now is found by the next mount.
    shutil.rmtree(directory, ignore_errors=True)
