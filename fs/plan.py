"""What one commit will store: a pure function from a file's base and its dirty bytes. No I/O, no await."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from apollofs.fs.growing_blob import GrowingBlob
from apollofs.fs.segments import Segment
from apollofs.metadata import extents
from apollofs.metadata.records import Body, BodyChange, Extent

GAP_BYTES = 64 << 10
"""When a file is rewritten: holes up to this size are filled with zeros rather than kept apart, if it must be."""
RUNS_MAX = 1024
"""When a file is rewritten: so many extents at most."""
STAGED = -1
"""In place of a blob's number: the bytes are in the staging file."""


@dataclass(frozen=True, slots=True)
class Dirty:
    """What a commit takes along of an open file, as of one moment."""

    segments: tuple[Segment, ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    """(offset, length), cut before the segments are laid over."""
    size_at_least: int = 0
    append_from: int | None = None
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the file that is to be stored: staged bytes if `segment` is there, else bytes of the base."""

    offset: int
    length: int
    segment: Segment | None
    early: tuple[GrowingBlob, int] | None = None
    """Where it is in the store already: from which byte on in which blob."""

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Place:
    """Where a plan's bytes are stored: from `offset` on in a blob of `blob_length` bytes."""

    blob: int
    offset: int
    blob_length: int
    is_packed: bool = False
    """Bytes of other files are there too."""


FindEarly = Callable[[Segment], Iterable[tuple[Segment, GrowingBlob, int]]]
"""The parts of a segment that are in the store already, in order, each with its place there."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One commit. `parts` are stored one behind the other, in a blob or inline, but for those that are stored early."""

    base: Body
    dirty: Dirty
    parts: tuple[Part, ...]
    inline: bool = False
    rewrites_all: bool = False

    @property
    def length(self) -> int:
        """Bytes that will be stored."""
        return sum(part.length for part in self.unstored)

    @property
    def unstored(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.early is None)

    @property
    def has_early(self) -> bool:
        return any(part.early is not None for part in self.parts)

    def with_early(self, find: FindEarly) -> Plan:
        """The same, with what is in the store already told apart."""
        if self.inline:
            return self
        return replace(self, parts=tuple(piece for part in self.parts for piece in _split(part, find)))

    @property
    def content(self) -> tuple[tuple[int, int, int], ...]:
        """What is stored, wherever in the file it belongs: plans with the same content can share a blob."""
        version = self.base.inode.body_version
        return tuple(
            (part.length, part.segment.at, -1) if part.segment is not None else (part.length, part.offset, version)
            for part in self.parts
        )

    def inline_change(self, data: bytes) -> BodyChange:
        """The change that makes `data` (the parts' bytes) the whole body."""
        assert self.inline
        return replace(self._bare_change(), inline=data, append_from=None)

    def blob_change(self, place: Place | None) -> BodyChange:
        """The change that lays the parts, stored at `place` (None: there are none), over the file."""
        assert not self.inline
        change = replace(self._bare_change(), extents=tuple(self._extents(place)))
        if place is not None:
            change = replace(change, is_packed=place.is_packed)
        if self.rewrites_all:
            return replace(change, rewrites_all=True, append_from=None)
        return replace(
            change,
            holes=self.dirty.holes,
            lifts_inline=self.base.inode.is_inline,
        )

    def _bare_change(self) -> BodyChange:
        dirty = self.dirty
        return BodyChange(
            base_version=self.base.inode.body_version,
            size_at_least=dirty.size_at_least,
            append_from=dirty.append_from,
            # 0 would mean "now": whoever set the time to 1970 exactly gets one nanosecond more.
            mtime_ns=dirty.mtime_ns or 1,
        )

    def _extents(self, place: Place | None) -> Iterator[Extent]:
        """Neighbouring parts share an extent if they are neighbours in the store, except across the offset from which
        extents may be moved."""
        split = self.dirty.append_from if not self.rewrites_all else None
        last: Extent | None = None
        for found in self._placed(place, split):
            if last is not None and found.offset != split and _continues(last, found):
                last = replace(last, length=last.length + found.length)
                continue
            if last is not None:
                yield last
            last = found
        if last is not None:
            yield last

    def _placed(self, place: Place | None, split: int | None) -> Iterator[Extent]:
        """Each part, or half of it, where it is in the store."""
        stored = place.offset if place is not None else 0
        for part in self.parts:
            early = part.early
            for start, end in _halves(part, split):
                if early is not None:
                    blob, at = early
                    yield Extent(start, end - start, blob.number, at + start - part.offset, blob.length)
                else:
                    assert place is not None
                    yield Extent(start, end - start, place.blob, stored, place.blob_length)
                    stored += end - start


def layout(base: Body, segments: Iterable[Segment]) -> extents.Extents:
    """Where a file has data, staged or stored, as extents; those of blob STAGED and 0 are not in the store."""
    return extents.overlay(_stored(base), _as_extents(segments))


def without_holes(base: Body, holes: Iterable[tuple[int, int]]) -> Body:
    """The base as it will be once holes have been cut: zeros are read there."""
    stored, inline = base.inode.extents, base.inline
    for offset, length in holes:
        stored = extents.punch(stored, offset, length)
        if offset < len(inline):
            end = min(offset + length, len(inline))
            inline = inline[:offset] + bytes(end - offset) + inline[end:]
    return Body(base.inode._replace(extents=stored), inline)


def make_plan(base: Body, dirty: Dirty, inline_bytes_max: int, *, rewrite: bool = False) -> Plan:
    """How `dirty` is to be committed over `base`, which has all its extents, and the holes of `dirty` already cut.

    `rewrite`: store the whole file anew, because it has too many extents.
    """
    if not base.inode.extents:
        parts = _whole_of_inline(base, dirty)
        end = parts[-1].end if parts else 0
        if end <= inline_bytes_max:
            return Plan(base, dirty, tuple(_without_gaps(parts)), inline=True)
        return Plan(base, dirty, parts)
    if rewrite:
        return Plan(base, dirty, tuple(_whole(base, dirty)), rewrites_all=True)
    return Plan(base, dirty, tuple(Part(found.offset, found.length, found) for found in dirty.segments))


def _whole_of_inline(base: Body, dirty: Dirty) -> tuple[Part, ...]:
    """The staged parts and what stays of the inline bytes between them; a hole in those is left out."""
    return tuple(_joined(_stored(base), dirty))


def _stored(base: Body) -> extents.Extents:
    length = len(base.inline)
    return (Extent(0, length, 0, 0, length),) if length else base.inode.extents


def _as_extents(segments: Iterable[Segment]) -> extents.Extents:
    return tuple(Extent(found.offset, found.length, STAGED, found.at, 0) for found in segments)


def _whole(base: Body, dirty: Dirty) -> Iterable[Part]:
    """All that is not a hole. If it is in too many pieces, the smallest holes are filled."""
    parts = list(_joined(base.inode.extents, dirty))
    gap = 0
    while sum(1 for _ in _runs(parts)) > RUNS_MAX:
        gap = max(GAP_BYTES, gap * 2)
        parts = list(_fill(parts, gap))
    return parts


def _joined(stored: extents.Extents, dirty: Dirty) -> Iterator[Part]:
    """Staged parts, and between them what stays of the base's data."""
    for offset, length in dirty.holes:
        stored = extents.punch(stored, offset, length)
    stored = extents.overlay(stored, _as_extents(dirty.segments))
    parts = [Part(extent.offset, extent.length, None) for extent in stored if extent.blob != STAGED]
    parts += [Part(segment.offset, segment.length, segment) for segment in dirty.segments]
    parts.sort(key=lambda part: part.offset)
    return iter(parts)


def _without_gaps(parts: Sequence[Part]) -> Iterator[Part]:
    """With the gaps, the one before the first part too, as parts of the base, which has zeros there."""
    at = 0
    for part in parts:
        if part.offset > at:
            yield Part(at, part.offset - at, None)
        yield part
        at = part.end


def _fill(parts: Sequence[Part], gap: int) -> Iterator[Part]:
    """With gaps of up to `gap` bytes between parts filled."""
    at: int | None = None
    for part in parts:
        if at is not None and at < part.offset <= at + gap:
            yield Part(at, part.offset - at, None)
        yield part
        at = part.end


def _runs(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of parts that follow each other."""
    start = end = -1
    for part in parts:
        if part.offset != end:
            if end > start:
                yield start, end
            start = part.offset
        end = part.end
    if end > start:
        yield start, end


def _continues(before: Extent, after: Extent) -> bool:
    if (before.blob, before.blob_length) != (after.blob, after.blob_length):
        return False
    return after.offset - before.offset == after.blob_offset - before.blob_offset == before.length


def _split(part: Part, find: FindEarly) -> Iterator[Part]:
    """A part, cut where what is stored already begins and ends."""
    at = part.offset
    for found, blob, blob_offset in find(part.segment) if part.segment is not None else ():
        assert part.segment is not None
        if found.offset > at:
            yield Part(at, found.offset - at, part.segment.cut(at, found.offset))
        yield Part(found.offset, found.length, found, (blob, blob_offset))
        at = found.end
    if at == part.offset:
        yield part
    elif at < part.end:
        assert part.segment is not None
        yield Part(at, part.end - at, part.segment.cut(at, part.end))


def _halves(part: Part, split: int | None) -> Iterator[tuple[int, int]]:
    if split is not None and part.offset < split < part.end:
        yield part.offset, split
        yield split, part.end
    else:
        yield part.offset, part.end
