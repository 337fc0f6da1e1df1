"""Reading and writing local files without holding up the event loop.

Bytes in the page cache are copied inline, which takes microseconds; what would wait for a disk goes to a thread
(about 100 us for the way there and back).
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache, partial

import trio

INLINE_BYTES_MAX = 128 << 10
"""Up to here a write to the page cache is cheaper than the way to a thread."""
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_NOT_AT_ONCE = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def read_at_once(fd: int, offset: int, length: int) -> bytearray | None:
    """`length` bytes at `offset` if all of them are in the page cache, else None. Never waits for a disk.

    What it returns is the buffer that was read into: a copy of a MiB can cost more than reading it.

    Raises OSError for anything but having to wait.
    """
    buffer = bytearray(length)
    try:
        found = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as exc:
        if exc.errno in _NOT_AT_ONCE:
            return None
        raise
    return buffer if found == length else None


def read_fully(fd: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes at `offset`; fewer only at the end of the file. Blocks."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    done = len(data)
    while done < length:
        data = os.pread(fd, length - done, offset + done)
        if not data:
            break
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def write_fully(fd: int, offset: int, data: bytes | bytearray | memoryview) -> None:
    """All of `data` at `offset`. Blocks. Raises OSError; some of it may then have been written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


async def read(fd: int, offset: int, length: int, limiter: trio.CapacityLimiter) -> bytes:
    """Up to `length` bytes, inline if they are in the page cache, else in a thread.

    Cancellation waits for the thread: the descriptor may be closed as soon as this has returned.
    """
    if length <= INLINE_BYTES_MAX:
        data = read_at_once(fd, offset, length)
        if data is not None:
            return bytes(data)
    return await trio.to_thread.run_sync(partial(read_fully, fd, offset, length), limiter=limiter)


async def write(fd: int, offset: int, data: bytes | bytearray | memoryview, limiter: trio.CapacityLimiter) -> None:
    """All of `data`, inline if it is small. Cancellation waits for the thread."""
    if len(data) <= INLINE_BYTES_MAX:
        write_fully(fd, offset, data)
        return
    await trio.to_thread.run_sync(partial(write_fully, fd, offset, data), limiter=limiter)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give a range's room back to the disk. Whether the local filesystem could."""
    result: int = _libc().fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length))
    return result == 0


@cache
def _libc() -> ctypes.CDLL:
    # Python has no call for it. It takes 64-bit offsets on every platform that we run on.
    return ctypes.CDLL(None)
