"""Memory for whole objects: at the start of a page, as O_DIRECT wants it, and used again instead of faulted in anew.

A page that is touched for the first time costs 0.3 core-seconds a GB and more (`docs/PERFORMANCE.md`).
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from typing import Final

KEPT_BYTES_MAX: Final = 128 << 20
"""So much memory that nobody uses is kept."""
STEP_BYTES: Final = 256 << 10
LEAST_BYTES: Final = 1 << 20
"""What is smaller is malloc's."""


class Rooms:
    """Those of one store. To be used from any thread."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._free: deque[mmap.mmap] = deque()

    def take(self, length: int) -> memoryview:
        """`length` bytes of whatever was there; the caller's until the last view of them is gone."""
        if length < LEAST_BYTES:
            return memoryview(bytearray(length))
        area = self._find(length) or mmap.mmap(-1, -(-length // STEP_BYTES) * STEP_BYTES)
        # Every view holds this object, and nothing else tells when the last one has gone.
        held = (ctypes.c_char * length).from_buffer(area)
        weakref.finalize(held, self._give_back, area).atexit = False
        return memoryview(held).cast("B")

    def _find(self, length: int) -> mmap.mmap | None:
        """A free one that fits and of which at least half is used: so memory is at most twice what its users count."""
        for _ in range(len(self._free)):
            try:
                area = self._free.pop()
            except IndexError:  # another thread was quicker
                break
            if length <= len(area) <= 2 * length:
                return area
            self._free.appendleft(area)
        return None

    def _give_back(self, area: mmap.mmap) -> None:
        # Called wherever the last view is dropped, so it may not wait for a lock that its thread could hold.
        self._free.append(area)
        while self._free and sum(map(len, tuple(self._free))) > self._kept_bytes_max:
            try:
                self._free.popleft()
            except IndexError:
                break
