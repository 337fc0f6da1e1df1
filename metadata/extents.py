"""Arithmetic of extents: pure functions over tuples, no I/O.

A *list* here is a tuple of extents in order of offset that do not overlap; what no extent covers is a hole. Every
function takes and gives such lists. None changes what a blob's byte means: an extent is cut or moved, never stretched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from apollofs.metadata.records import Extent

Extents = tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file: a part of a blob, or a hole (`extent` is None)."""

    offset: int
    length: int
    extent: Extent | None

    @property
    def end(self) -> int:
        return self.offset + self.length


def cut(extent: Extent, start: int, end: int) -> Extent:
    """The part of an extent that covers file bytes `[start, end)`, which must lie within it and not be empty."""
    assert extent.offset <= start < end <= extent.end
    return replace(extent, offset=start, length=end - start, blob_offset=extent.blob_offset + start - extent.offset)


def overlay(newest: Extents, laid: Iterable[Extent]) -> Extents:
    """`newest` with each extent of `laid`, in their order, laid over it; neighbours in one blob are merged."""
    added = tuple(laid)
    if any(before.end > after.offset for before, after in pairwise(added)):
        added = _in_turn(added)
    if not added:
        return merge(newest)
    return merge(sorted([*_outside(newest, added), *added], key=_offset_of))


def punch(extents: Extents, offset: int, length: int) -> Extents:
    """Without file bytes `[offset, offset + length)`: they become a hole."""
    if length <= 0:
        return extents
    return tuple(_outside(extents, (Extent(offset, length, 0, 0, 0),)))


def truncate(extents: Extents, size: int) -> Extents:
    """Without what lies at or past `size`."""
    kept = extents[: _first_ending_after(extents, size)]
    rest = extents[len(kept) :]
    if rest and rest[0].offset < size:
        return (*kept, cut(rest[0], rest[0].offset, size))
    return kept


def shift(extents: Iterable[Extent], start: int, distance: int) -> Extents:
    """Extents at or past `start` moved by `distance` bytes; one that lies across `start` is cut there first."""
    moved: list[Extent] = []
    for extent in extents:
        if extent.end <= start:
            moved.append(extent)
            continue
        if extent.offset < start:
            moved.append(cut(extent, extent.offset, start))
            extent = cut(extent, start, extent.end)
        moved.append(replace(extent, offset=extent.offset + distance))
    return tuple(moved)


def merge(extents: Iterable[Extent]) -> Extents:
    """Neighbours that continue each other both in the file and in one blob become one."""
    merged: list[Extent] = []
    for extent in extents:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.end == extent.offset
            and last.blob == extent.blob
            and last.blob_offset + last.length == extent.blob_offset
        ):
            merged[-1] = replace(last, length=last.length + extent.length)
        else:
            merged.append(extent)
    return tuple(merged)


def pieces(extents: Extents, offset: int, length: int) -> list[Piece]:
    """What file bytes `[offset, offset + length)` consist of, in order and without gaps; nothing of an empty range."""
    found: list[Piece] = []
    if length <= 0:
        return found
    end = offset + length
    at = offset
    for index in range(_first_ending_after(extents, offset), len(extents)):
        extent = extents[index]
        if extent.offset >= end:
            break
        if extent.offset > at:
            found.append(Piece(at, extent.offset - at, None))
            at = extent.offset
        stop = min(extent.end, end)
        found.append(Piece(at, stop - at, cut(extent, at, stop)))
        at = stop
    if at < end:
        found.append(Piece(at, end - at, None))
    return found


def next_data(extents: Extents, offset: int) -> int | None:
    """The first byte at or after `offset` that is not in a hole; None if there is none."""
    index = _first_ending_after(extents, offset)
    return max(offset, extents[index].offset) if index < len(extents) else None


def next_hole(extents: Extents, offset: int) -> int:
    """The first byte at or after `offset` that is in a hole; what follows the last extent counts as one."""
    for index in range(_first_ending_after(extents, offset), len(extents)):
        if extents[index].offset > offset:
            break
        offset = extents[index].end
    return offset


def stored_bytes(extents: Iterable[Extent]) -> int:
    """How many bytes of the file are not holes."""
    return sum(extent.length for extent in extents)


def _offset_of(extent: Extent) -> int:
    return extent.offset


def _end_of(extent: Extent) -> int:
    return extent.end


def _first_ending_after(extents: Extents, offset: int) -> int:
    """Index of the first extent of which a byte lies at or past `offset`."""
    return bisect_right(extents, offset, key=_end_of)


def _in_turn(laid: Extents) -> Extents:
    """Extents that overlap or are out of order, as a list: the later one wins."""
    done: Extents = ()
    for extent in laid:
        done = punch(done, extent.offset, extent.length)
        index = _first_ending_after(done, extent.offset)
        done = (*done[:index], extent, *done[index:])
    return done


def _outside(extents: Extents, covers: Extents) -> list[Extent]:
    """The parts of `extents` that no extent of the list `covers` covers. Linear in both."""
    left: list[Extent] = []
    first = 0
    for extent in extents:
        while first < len(covers) and covers[first].end <= extent.offset:
            first += 1
        at = extent.offset
        for index in range(first, len(covers)):
            cover = covers[index]
            if cover.offset >= extent.end:
                break
            if cover.offset > at:
                left.append(cut(extent, at, cover.offset))
            at = cover.end
        if at < extent.end:
            left.append(cut(extent, at, extent.end))
    return left
