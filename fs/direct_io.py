"""Writing past the page cache: what is written once and read a good while later costs no memory and no copy there.

Filling fresh pages costs 0.3 to 2 core-seconds a GB (`docs/PERFORMANCE.md`); the disk takes the bytes from where they
are. So many writes at once go that way; what comes faster than the disk takes it goes through the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

from apollofs.fs.local_io import write_fully

ALIGNMENT = 4096
WRITES_AT_ONCE_MAX = 8
BUFFER_BYTES = 1 << 20
_slots = threading.BoundedSemaphore(WRITES_AT_ONCE_MAX)
_of_thread = threading.local()


def write_past_cache(fd: int, offset: int, data: memoryview) -> None:
    """All of `data` at `offset` of a file that is open for writing. Blocks.

    Through the page cache where it can't be done otherwise: on filesystems without O_DIRECT, what is not aligned at
    4 KiB, and beyond WRITES_AT_ONCE_MAX. Raises OSError; some of it may then have been written.
    """
    aligned = 0
    if offset % ALIGNMENT == 0 and _slots.acquire(blocking=False):
        try:
            aligned = _write_aligned(fd, offset, data[: len(data) // ALIGNMENT * ALIGNMENT])
        finally:
            _slots.release()
    write_fully(fd, offset + aligned, data[aligned:])


def _write_aligned(fd: int, offset: int, data: memoryview) -> int:
    """How many bytes were written."""
    try:
        direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOENT):
            return 0  # no O_DIRECT here, or no /proc
        raise
    try:
        done = 0
        while done < len(data):
            try:
                written = _write_some(direct_fd, offset + done, data[done:])
            except OSError as exc:
                if exc.errno == errno.EINVAL:
                    break  # this disk wants more than ALIGNMENT
                raise
            if written % ALIGNMENT:
                break
            done += written
        return done
    finally:
        os.close(direct_fd)


def _write_some(fd: int, offset: int, data: memoryview) -> int:
    try:
        return os.pwrite(fd, data, offset)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
    # the disk wants memory that is aligned
    part = data[:BUFFER_BYTES]
    buffer = _buffer()[: len(part)]
    buffer[:] = part
    return os.pwrite(fd, buffer, offset)


def _buffer() -> memoryview:
    """A thread's own, at the start of a page."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    buffer: memoryview = _of_thread.buffer
    return buffer
