"""The archive index: which segments there are, and how far the log is archived. It is in etcd, so that what the archive
holds is one fact for everybody, and changes in one transaction with the right to change it.

Rules
1. Only who has the role of the archiver writes here; every transaction compares its key, and that the state is as
   known.
2. A segment's object is stored before its key is put, and removed after its key is.
3. Segments do not overlap, and lie without gaps between `open_from` and each other, but for what was compacted before
   it was archived; a reader sees such a gap as a segment that begins later than where the one before has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from apollofs.metadata import codec
from apollofs.metadata.changes.role import Role
from apollofs.metadata.changes.segment import Segment, unpack
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Compare, Delete, KeyValue, Op, Put, Range, RangeResult, Relation, Store, Target
from apollofs.metadata.store import prefix_end as end_of

READ_S = 30.0
PAGE_SEGMENTS = 256
POINTS_MAX = 64
POINT_EVERY_NS = 60 * 10**9


class SegmentEntry(NamedTuple):
    """One segment. Times are the earliest and the latest of its changes, by the clocks of the mounts."""

    first_revision: int
    last_revision: int
    first_time_ns: int
    last_time_ns: int
    changes: int
    size_bytes: int
    site: int
    """In whose store its object is."""
    name: str
    """Of the object."""
    archived_ns: int = 0
    """When, by the archiver's clock: those of mounts may be anywhere. 0: an archiver of before has not told."""

    gathered_bytes: int = 0
    """In memory, about, when it was gathered. 0: an archiver of before has not told."""
    merged_from_ns: int = 0
    """When the first of the segments was archived that were merged into this one; 0: it was not merged."""

    @property
    def kept_since_ns(self) -> int:
        """For retention."""
        return self.archived_ns or self.last_time_ns


@dataclass(frozen=True, slots=True)
class ArchiveState:
    """How far the log is archived. `revision` is that of the record; 0: nothing was ever archived."""

    through: int = 0
    """Everything up to this revision is in the archive, or was lost before."""
    open_from: int = 0
    """Where the next segment begins: between here and `through` nothing has happened."""
    points: tuple[tuple[int, int], ...] = ()
    """(revision, time in ns): that revision was archived at that time; for compaction. Ascending, bounded."""
    lost_ns: int = 0
    """The latest time of what is in the archive no more, or was never in it, by the clocks of the mounts as far as it
    is known; 0: all is there. Readers by time go by it."""
    size_bytes: int | None = 0
    """Of all segments together. None: an archiver of before has not told."""
    revision: int = 0

    def advanced(self, through: int, open_from: int) -> ArchiveState:
        """Archived further, now."""
        points = self.points
        if len(points) > 1 and points[-1][1] - points[-2][1] < POINT_EVERY_NS:
            points = points[:-1]  # the newest one moves along until it is far enough from the one before
        points = (*points, (through, time.time_ns()))
        if len(points) > POINTS_MAX:
            points = points[1::2]
        return replace(self, through=through, open_from=open_from, points=points)

    def resized(self, more_bytes: int) -> ArchiveState:
        return self if self.size_bytes is None else replace(self, size_bytes=self.size_bytes + more_bytes)

    def without(self, last_time_ns: int) -> ArchiveState:
        """Changes of up to a time are lost; of one that lies in the future nobody knows but that they have been."""
        return replace(self, lost_ns=max(self.lost_ns, min(last_time_ns, time.time_ns())))


@dataclass(frozen=True, slots=True)
class IndexPage:
    """Segments in order, whether more follow, and the state; all as of one revision."""

    state: ArchiveState
    entries: tuple[SegmentEntry, ...]
    more: bool


class ArchiveIndex:
    """Methods raise DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def page(self, revision: int, limit: int = PAGE_SEGMENTS) -> IndexPage:
        """The segments that hold, or come after, a revision. One request."""
        asked = (Range(self._keys.archive_state), self._segments(revision, limit))
        found = await retry(lambda: self._store.txn((), asked), READ_S)
        state, segments = found.ranges
        assert state is not None and segments is not None
        return IndexPage(_state_of(state), tuple(map(_entry_of, segments.kvs)), segments.more)

    async def state(self) -> ArchiveState:
        return _state_of(await retry(lambda: self._store.range(Range(self._keys.archive_state)), READ_S))

    def _segments(self, revision: int, limit: int) -> Range:
        return Range(self._keys.segment(revision), end_of(self._keys.segments), limit=limit)

    # -- for the archiver --------------------------------------------------------------------------------------------

    async def add(self, role: Role, state: ArchiveState, entry: SegmentEntry) -> ArchiveState:
        """The segment's object is stored: it is part of the archive from now on. Raises RoleLost."""
        put = Put(self._keys.segment(entry.last_revision), codec.encode_fields(entry))
        state = state.resized(entry.size_bytes).advanced(entry.last_revision, entry.last_revision + 1)
        return await self._put_state(role, state, (put,))

    async def advance(self, role: Role, state: ArchiveState, through: int) -> ArchiveState:
        """Nothing has happened up to a revision. Raises RoleLost."""
        return await self._put_state(role, state.advanced(through, state.open_from), ())

    async def skip(self, role: Role, state: ArchiveState, first: int) -> ArchiveState:
        """What was before `first` is lost. Raises RoleLost."""
        return await self._put_state(role, state.without(time.time_ns()).advanced(first - 1, first), ())

    async def begin(self, role: Role, first: int) -> ArchiveState:
        """Nothing was ever archived, and nothing was before `first`. Raises RoleLost."""
        return await self._put_state(role, ArchiveState().advanced(first - 1, first), ())

    async def remove(self, role: Role, state: ArchiveState, entries: Sequence[SegmentEntry]) -> ArchiveState:
        """These are not part of the archive any more; their objects are the caller's to delete. Raises RoleLost."""
        deletes = [Delete(self._keys.segment(entry.last_revision)) for entry in entries]
        state = state.resized(-sum(entry.size_bytes for entry in entries))
        return await self._put_state(role, state.without(max(entry.last_time_ns for entry in entries)), deletes)

    async def merge(
        self, role: Role, state: ArchiveState, entries: Sequence[SegmentEntry], merged: SegmentEntry
    ) -> ArchiveState:
        """One in place of neighbours, whose objects are the caller's to delete. It has the key of the last one. Raises
        RoleLost."""
        writes: list[Op] = [Delete(self._keys.segment(entry.last_revision)) for entry in entries[:-1]]
        writes.append(Put(self._keys.segment(merged.last_revision), codec.encode_fields(merged)))
        more_bytes = merged.size_bytes - sum(entry.size_bytes for entry in entries)
        return await self._put_state(role, state.resized(more_bytes), writes)

    async def sized(self, state: ArchiveState) -> ArchiveState:
        """With the size of all segments, if the state does not have it: all of the index is read. For who has the
        role; it is put with the next change."""
        if state.size_bytes is not None:
            return state
        total, revision, more = 0, 0, True
        while more:
            page = await self.page(revision)
            total += sum(entry.size_bytes for entry in page.entries)
            more = page.more
            revision = page.entries[-1].last_revision + 1 if page.entries else revision
        return replace(state, size_bytes=total)

    async def _put_state(self, role: Role, state: ArchiveState, writes: Sequence[Op]) -> ArchiveState:
        key = self._keys.archive_state
        known = Compare(key, Target.MOD, Relation.EQUAL, state.revision)
        points = [number for point in state.points for number in point]
        value = codec.encode_fields([state.through, state.open_from, points, state.lost_ns, state.size_bytes])
        revision = await role.commit((known,), (Put(key, value), *writes), written=(key, value))
        return replace(state, revision=revision)


async def has_segments_at(store: Store, keys: Keys, site: int) -> bool:
    """Whether a site's store holds part of the archive. Reads the whole index. Raises DeadlineExceeded, StoreError."""
    index, revision, more = ArchiveIndex(store, keys), 0, True
    while more:
        page = await index.page(revision)
        if any(entry.site == site for entry in page.entries):
            return True
        more = page.more
        revision = page.entries[-1].last_revision + 1 if page.entries else revision
    return False


def _state_of(found: RangeResult) -> ArchiveState:
    if not found.kvs:
        return ArchiveState()
    through, open_from, points, *more = codec.decode_fields(found.kvs[0].value)
    pairs = tuple((points[at], points[at + 1]) for at in range(0, len(points), 2))
    # an archiver that did not tell may have removed all that it had archived
    lost_ns, size_bytes = more or (pairs[-1][1], None)
    return ArchiveState(through, open_from, pairs, lost_ns, size_bytes, found.kvs[0].mod_revision)


def unpacked(entry: SegmentEntry, data: bytes) -> Segment:
    """Raises CorruptRecord where the object is not the segment that the index means."""
    segment = unpack(data)
    if (segment.first_revision, segment.last_revision) != (entry.first_revision, entry.last_revision):
        raise CorruptRecord(f"segment {entry.name} of the change log is another one")
    return segment


def _entry_of(kv: KeyValue) -> SegmentEntry:
    try:
        return SegmentEntry(*codec.decode_fields(kv.value))
    except TypeError as exc:
        raise CorruptRecord(f"an entry of the archive index does not decode: {exc}") from exc
