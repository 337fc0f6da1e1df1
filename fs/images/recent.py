"""Blocks that were fetched a moment ago, in memory: a stream that is read ahead finds them there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

RECENT_BYTES_MAX = 96 << 20


class RecentBlocks:
    """By image and the block's number. What was read to its end leaves first, then what was used least."""

    def __init__(self, bytes_max: int = RECENT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._blocks: OrderedDict[tuple[Hashable, int], memoryview] = OrderedDict()
        self._bytes = 0

    def get(self, image: Hashable, index: int) -> memoryview | None:
        """The block, if it is still there."""
        found = self._blocks.get((image, index))
        if found is not None:
            self._blocks.move_to_end((image, index))
        return found

    def read(self, image: Hashable, index: int, start: int, length: int) -> memoryview | None:
        """Bytes `[start, start + length)` of the block; None if it is not there."""
        found = self.get(image, index)
        if found is None:
            return None
        if start + length >= len(found):
            self._blocks.move_to_end((image, index), last=False)
        return found[start : start + length]

    def add(self, image: Hashable, index: int, data: memoryview) -> None:
        self._drop(image, index)
        self._blocks[image, index] = data
        self._bytes += len(data)
        while self._bytes > self._bytes_max:
            self._drop(*next(iter(self._blocks)))

    def forget(self, image: Hashable) -> None:
        """Drop all blocks of an image."""
        for known, index in [at for at in self._blocks if at[0] is image]:
            self._drop(known, index)

    def _drop(self, image: Hashable, index: int) -> None:
        found = self._blocks.pop((image, index), None)
        if found is not None:
            self._bytes -= len(found)
