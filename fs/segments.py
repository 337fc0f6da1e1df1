"""Which bytes of a file are staged, and where: an interval map from file offsets to offsets in the staging file."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """File bytes `[offset, offset + length)` are staged at `[at, at + length)`."""

    offset: int
    length: int
    at: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def cut(self, start: int, end: int) -> Segment:
        """The part for file bytes `[start, end)`, which must lie within."""
        assert self.offset <= start < end <= self.end
        return Segment(start, end - start, self.at + start - self.offset)


class SegmentMap:
    """Segments in order of offset, never overlapping; neighbours that continue each other in both places are one.

    `version` grows with each change.
    """

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self.version = 0

    def __len__(self) -> int:
        return len(self._segments)

    def __bool__(self) -> bool:
        return bool(self._segments)

    @property
    def end(self) -> int:
        """Where the last segment ends; 0 if there is none."""
        return self._segments[-1].end if self._segments else 0

    def segments(self) -> tuple[Segment, ...]:
        return tuple(self._segments)

    def within(self, offset: int, length: int) -> list[Segment]:
        """What is staged of `[offset, offset + length)`, cut to it."""
        end = offset + length
        found = []
        for index in range(self._first_ending_after(offset), len(self._segments)):
            segment = self._segments[index]
            if segment.offset >= end:
                break
            found.append(segment.cut(max(segment.offset, offset), min(segment.end, end)))
        return found

    def end_before(self, offset: int) -> int:
        """Where what is staged below `offset` ends; 0 if nothing is."""
        index = bisect_left(self._segments, offset, key=_start_of)
        return min(self._segments[index - 1].end, offset) if index else 0

    def put(self, segment: Segment) -> list[Segment]:
        """Lay a segment over what was there; returns what it replaced."""
        replaced = self.drop(segment.offset, segment.end)
        self.version += 1
        index = self._first_ending_after(segment.offset)
        if index > 0 and _continues(self._segments[index - 1], segment):
            index -= 1
            before = self._segments.pop(index)
            segment = Segment(before.offset, before.length + segment.length, before.at)
        if index < len(self._segments) and _continues(segment, self._segments[index]):
            after = self._segments.pop(index)
            segment = Segment(segment.offset, segment.length + after.length, segment.at)
        self._segments.insert(index, segment)
        return replaced

    def drop(self, start: int, end: int | None = None) -> list[Segment]:
        """Take `[start, end)` out (None: to the end); returns what was there."""
        first = self._first_ending_after(start)
        gone: list[Segment] = []
        kept: list[Segment] = []
        index = first
        while index < len(self._segments):
            segment = self._segments[index]
            stop = segment.end if end is None else min(segment.end, end)
            if stop <= max(segment.offset, start):
                break
            if segment.offset < start:
                kept.append(segment.cut(segment.offset, start))
            gone.append(segment.cut(max(segment.offset, start), stop))
            if stop < segment.end:
                kept.append(segment.cut(stop, segment.end))
            index += 1
        if gone:
            self._segments[first:index] = kept
            self.version += 1
        return gone

    def shift(self, start: int, distance: int) -> list[Segment]:
        """Move what lies at or past `start` by `distance`; returns what it was moved over (if `distance` < 0)."""
        moving = self.drop(start)
        replaced: list[Segment] = []
        for segment in moving:
            replaced += self.put(Segment(segment.offset + distance, segment.length, segment.at))
        return replaced

    def forget(self, staged: Iterable[Segment]) -> None:
        """Take out whatever is staged at the places of `staged`, wherever in the file it is now."""
        places = sorted((segment.at, segment.at + segment.length) for segment in staged)
        kept: list[Segment] = []
        for segment in self._segments:
            kept += _outside(segment, places)
        self._segments = kept
        self.version += 1

    def clear(self) -> list[Segment]:
        gone, self._segments = self._segments, []
        self.version += 1
        return gone

    def _first_ending_after(self, offset: int) -> int:
        return bisect_right(self._segments, offset, key=_end_of)


def shifted(segments: Iterable[Segment], start: int, distance: int) -> tuple[Segment, ...]:
    """As `SegmentMap.shift`, of a snapshot; a segment across `start` is cut there. `distance` may be negative."""
    whole = SegmentMap()
    for segment in segments:
        whole.put(segment)
    whole.shift(start, distance)
    return whole.segments()


def _start_of(segment: Segment) -> int:
    return segment.offset


def _end_of(segment: Segment) -> int:
    return segment.end


def _continues(before: Segment, after: Segment) -> bool:
    return before.end == after.offset and before.at + before.length == after.at


def _outside(segment: Segment, places: Sequence[tuple[int, int]]) -> list[Segment]:
    """The parts of a segment that are staged in none of `places` (sorted, not overlapping)."""
    left: list[Segment] = []
    position = segment.at
    stop = segment.at + segment.length
    for start, end in places[bisect_right(places, position, key=lambda place: place[1]) :]:
        if start >= stop:
            break
        if start > position:
            left.append(Segment(segment.offset + position - segment.at, start - position, position))
        position = max(position, end)
    if position < stop:
        left.append(Segment(segment.offset + position - segment.at, stop - position, position))
    return left
