"""Which bytes of two versions of a stretch differ: for merging what two mounts wrote into one file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_RUNS = re.compile(rb"[^\0]+")
Ranges = list[tuple[int, int]]
"""(start, end) in order, not overlapping."""


def differing(before: bytes | bytearray, after: bytes | bytearray, offset: int = 0) -> Iterator[tuple[int, int]]:
    """Where `after`, of bytes from `offset`, is not what `before` is; what only one of them has counts as differing."""
    if before == after:
        return
    common = min(len(before), len(after))
    mixed = int.from_bytes(before[:common], "little") ^ int.from_bytes(after[:common], "little")
    tail = max(len(before), len(after))
    for run in _RUNS.finditer(mixed.to_bytes(common, "little")):
        yield offset + run.start(), offset + run.end()
    if tail > common:
        yield offset + common, offset + tail


def joined(ranges: Iterable[tuple[int, int]], gap: int) -> Ranges:
    """`ranges`, those that are less than `gap` apart as one."""
    found: Ranges = []
    for start, end in ranges:
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def without(ranges: Iterable[tuple[int, int]], taken: Ranges) -> Iterator[tuple[int, int]]:
    """`ranges` without what lies in `taken`."""
    for start, end in ranges:
        at = start
        for low, high in taken:
            if high <= at or low >= end:
                continue
            if low > at:
                yield at, low
            at = high
        if at < end:
            yield at, end
