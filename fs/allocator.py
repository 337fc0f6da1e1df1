"""What malloc does with the buffers of blocks: they are used again, not given back to the system and faulted in anew.

By default glibc gives back what is free at the top of its heaps beyond 16 MiB. Then every block of 8 MiB that is read
or written costs a page fault and a cleared page for each 4 KiB: 0.3 core-seconds a GB and more.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 128 << 20
"""So much free memory a process that moves blocks keeps, unless it says otherwise."""
LARGEST_KEPT_BYTES = 32 << 20
"""Buffers from here on are the system's at once; the most that glibc takes."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_buffers(kept_bytes: int = KEPT_BYTES) -> None:
    """For programs that move bodies, once, at their start: with at least as much as they have under way at once. Does
    nothing where the C library has no such settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    # one arena: threads that end would leave what they kept in theirs
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    mallopt(_TRIM_THRESHOLD, kept_bytes)
