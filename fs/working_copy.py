"""WorkingCopy: a local file that stands for a body while processes of this host write it by themselves (passthrough).

What is at offset n of the file is at offset n here, and the size is the same. Nobody tells the daemon of a write: that
something was written shows in ctime only, and what, only by comparing checksums (`stored_blocks.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from apollofs.fs import local_io
from apollofs.fs.errors import StagingFailed, StagingFull
from apollofs.metadata.errors import FileTooLarge

T = TypeVar("T")
YOUNG_NS = 20_000_000
"""A ctime can stand still for so long while a file is written: a clock tick of the kernel's, and some."""
COPY_BYTES = 1 << 20
PROBES = 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Moment:
    """A working copy as it was at some moment. Two equal ones with `settled`: nothing was written in between."""

    size_bytes: int
    ctime_ns: int
    mtime_ns: int
    allocated_bytes: int
    settled: bool
    """Whether a write that came after it would have moved ctime."""

    def is_same(self, later: Moment) -> bool:
        return self.settled and (self.size_bytes, self.ctime_ns) == (later.size_bytes, later.ctime_ns)


class WorkingCopy:
    """Methods raise StagingFull and StagingFailed, where the local disk has no room or fails."""

    def __init__(self, path: str, fd: int, limiter: trio.CapacityLimiter, *, fine_times: bool = False) -> None:
        """Of the file `path`, which is open as `fd` for reading and writing, here alone. `fine_times`: the filesystem
        has them (`has_fine_times`)."""
        self.path = path
        self.fd = fd
        self._fine_times = fine_times
        self._limiter = limiter

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def moment(self) -> Moment:
        """No request, no disk."""
        found = os.fstat(self.fd)
        settled = self._fine_times or time.time_ns() - found.st_ctime_ns >= YOUNG_NS
        return Moment(found.st_size, found.st_ctime_ns, found.st_mtime_ns, found.st_blocks * 512, settled)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.fd).st_size

    # -- bytes, for the daemon ---------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end."""
        try:
            return await local_io.read(self.fd, offset, length, self._limiter)
        except OSError as exc:
            raise staging_error(exc) from exc

    async def write(self, offset: int, data: bytes | bytearray) -> None:
        try:
            await local_io.write(self.fd, offset, data, self._limiter)
        except OSError as exc:
            raise staging_error(exc) from exc

    def resize(self, size: int) -> None:
        """Raises FileTooLarge where the local disk can't have a file of this size."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as exc:
            if exc.errno == errno.EFBIG:
                raise FileTooLarge(f"the cache's disk can't have a file of {size} bytes") from exc
            raise staging_error(exc) from exc

    def punch(self, offset: int, length: int) -> None:
        """Bytes become zeros, within the file; a hole where the filesystem can make one."""
        length = min(length, self.size_bytes - offset)
        if length <= 0 or local_io.punch_hole(self.fd, offset, length):
            return
        try:
            for at in range(offset, offset + length, COPY_BYTES):
                local_io.write_fully(self.fd, at, bytes(min(COPY_BYTES, offset + length - at)))
        except OSError as exc:
            raise staging_error(exc) from exc

    async def move(self, start: int, end: int, distance: int) -> None:
        """Bytes `[start, end)` move up by `distance`; what is left where they were is not defined."""
        at = end
        while at > start:
            low = max(start, at - COPY_BYTES)
            await self.write(low + distance, await self.read(low, at - low))
            at = low

    def set_times(self, mtime_ns: int) -> int:
        """Returns the mtime as it is now: the disk may not know all times."""
        os.utime(self.fd, ns=(os.fstat(self.fd).st_atime_ns, mtime_ns))
        return os.fstat(self.fd).st_mtime_ns

    # -- holes -------------------------------------------------------------------------------------------------------

    async def seek(self, offset: int, whence: int) -> int | None:
        """SEEK_DATA or SEEK_HOLE; None at or past the end, or where only a hole follows."""
        return await self._looked(lambda fd: _seek(fd, offset, whence))

    async def data_within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of `[start, end)` without a hole, as (offset, end), in order. What lies past the end is a hole."""
        return await self._looked(lambda fd: _data_within(fd, start, end))

    async def _looked(self, look: Callable[[int], T]) -> T:
        """In a thread: who writes to the file holds the kernel's lock of it, and a look at its holes waits for that."""
        try:
            fd = os.dup(self.fd)  # the copy may be closed meanwhile
        except OSError as exc:
            raise staging_error(exc) from exc
        return await trio.to_thread.run_sync(_closing, fd, look, limiter=self._limiter)

    # -- the end -----------------------------------------------------------------------------------------------------

    def is_released(self) -> bool:
        """See the function. The kernel has let go of it as a backing file."""
        return is_released(self.fd)

    def close(self, *, keep: bool = False) -> None:
        """Let go of the file; `keep`: leave it where it is. Idempotent."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        os.close(fd)
        if not keep:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def _closing(fd: int, look: Callable[[int], T]) -> T:
    try:
        return look(fd)
    finally:
        os.close(fd)


def _seek(fd: int, offset: int, whence: int) -> int | None:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return None
        raise staging_error(exc) from exc


def _data_within(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    found = []
    low = _seek(fd, start, os.SEEK_DATA)
    while low is not None and low < end:
        hole = _seek(fd, low, os.SEEK_HOLE)
        if hole is None:
            break  # cut meanwhile
        found.append((low, min(hole, end)))
        low = _seek(fd, hole, os.SEEK_DATA) if hole < end else None
    return found


def is_released(fd: int) -> bool:
    """Whether nobody else has a file open or mapped: then nothing can be written to it any more. `fd` is open for
    reading and writing. Source: fcntl(2), F_SETLEASE."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as exc:
        return exc.errno not in (errno.EAGAIN, errno.EBUSY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def has_fine_times(directory: str) -> bool:
    """Whether, on this filesystem, every write that follows a look at ctime moves it, as since Linux 6.13 on ext4, xfs
    and btrfs; else it stands still for some milliseconds. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        times = set()
        for _ in range(PROBES):
            os.pwrite(probe.fileno(), b"x", 0)
            times.add(os.fstat(probe.fileno()).st_ctime_ns)
        return len(times) == PROBES


def staging_error(exc: OSError) -> StagingFull | StagingFailed:
    """What is told of a local disk's error."""
    if exc.errno in _FULL:
        return StagingFull(f"the local disk has no room for what is written: {exc}")
    return StagingFailed(f"the local disk fails under what is written: {exc}")
