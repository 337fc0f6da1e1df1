"""Small segments of the archive become one, so that its index does not grow by a key a minute for ever.

Rules
1. Neighbours only, without a gap between them, in the own site's store, and no more than one segment may have.
2. What is merged is stored first; one transaction of the role puts it into the index in place of the others, and then
   their objects are deleted. A reader that comes too late for one reads the index again; what was stored and not put
   into the index is an orphan as any other.
3. MERGED_AT_ONCE of about the same number of changes, and the smaller ones behind them: so each change is stored again
   a few times, not every minute. Those to which nothing can be added any more needn't be so many.
4. What is merged was archived within a day, or an eighth of the time for which segments are kept: retention removes
   whole segments.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence

from apollofs.metadata import journal
from apollofs.metadata.changes.archive_index import ArchiveIndex, ArchiveState, SegmentEntry, unpacked
from apollofs.metadata.changes.directories import places
from apollofs.metadata.changes.port import SegmentStore
from apollofs.metadata.changes.record import SlotEntry
from apollofs.metadata.changes.role import Role
from apollofs.metadata.changes.segment import Place, Segment, pack
from apollofs.metadata.errors import ArchiveUnavailable, CorruptRecord

log = logging.getLogger(__name__)
MERGED_AT_ONCE = 16
LEVELS = 4
"""Of size: those of a level have fewer changes than MERGED_AT_ONCE to its power."""
NEWEST_MAX = 64
"""So many segments from the end on are looked at: what may wait on all levels. One transaction can replace them."""
SPAN_NS_MAX = 86_400 * 10**9


class Merger:
    """Made by the archiver, which tells it of every segment. `changes_max`, `bytes_max` are those of a segment."""

    def __init__(
        self, index: ArchiveIndex, segments: SegmentStore, changes_max: int, bytes_max: int, keep_s: float
    ) -> None:
        self._index = index
        self._segments = segments
        self._changes_max = changes_max
        self._bytes_max = bytes_max
        self._span_ns = min(SPAN_NS_MAX, int(keep_s * 1e9 / 8) or SPAN_NS_MAX)
        self._newest: deque[SegmentEntry] = deque(maxlen=NEWEST_MAX)

    def note(self, entries: Iterable[SegmentEntry]) -> None:
        """These are the next ones of the archive."""
        self._newest.extend(entries)

    def forget(self, gone: Sequence[SegmentEntry]) -> None:
        """These are not part of the archive any more."""
        self._newest = deque((entry for entry in self._newest if entry not in gone), NEWEST_MAX)

    async def merge(self, role: Role, state: ArchiveState, prefix: str) -> ArchiveState:
        """Merge what is to be merged now, if anything; the object's name begins with `prefix`. What the store can't do
        is left for the next time. Raises RoleLost, DeadlineExceeded, StoreError."""
        chosen = self._chosen()
        if not chosen:
            return state
        try:
            merged = await self._stored(chosen, f"{prefix}{chosen[-1].last_revision:016x}-{role.token}")
            state = await self._index.merge(role, state, chosen, merged)
            self._take(chosen, merged)
            for entry in chosen:
                await self._segments.delete(entry)
        except ArchiveUnavailable as exc:
            log.info("segments of the change log are not merged, or stay until the next archiver begins: %s", exc)
        except CorruptRecord as exc:
            log.warning("segments of the change log can't be merged: %s", exc)
            self._newest.clear()
        return state

    def _take(self, chosen: Sequence[SegmentEntry], merged: SegmentEntry) -> None:
        left = [merged if entry == chosen[-1] else entry for entry in self._newest if entry not in chosen[:-1]]
        self._newest = deque(left, NEWEST_MAX)

    async def _stored(self, chosen: Sequence[SegmentEntry], name: str) -> SegmentEntry:
        """The segment of them all, whose object is stored. Raises ArchiveUnavailable, CorruptRecord."""
        segments: list[Segment] = []
        for entry in chosen:
            data = await self._segments.get(entry)
            if data is None:
                raise CorruptRecord(f"segment {entry.name} is missing")
            segments.append(unpacked(entry, data))
        data = pack(joined(segments))
        # the last one may have been stored in this role, too
        name = f"{name}-{chosen[0].first_revision:016x}"
        await self._segments.put(name, data)
        return chosen[-1]._replace(
            first_revision=chosen[0].first_revision,
            first_time_ns=min(entry.first_time_ns for entry in chosen),
            last_time_ns=max(entry.last_time_ns for entry in chosen),
            changes=sum(entry.changes for entry in chosen),
            size_bytes=len(data),
            name=name,
            archived_ns=max(entry.archived_ns for entry in chosen),
            gathered_bytes=sum(entry.gathered_bytes for entry in chosen),
            merged_from_ns=_begun_ns(chosen[0]),
        )

    def _chosen(self) -> list[SegmentEntry]:
        """What is to be merged now; nothing, mostly."""
        for level in range(1, LEVELS + 1):
            groups = self._groups(_smaller_at_the_end(self._newest, MERGED_AT_ONCE**level))
            for group in groups:
                are_many = len(group) > level * (MERGED_AT_ONCE - 1)
                if are_many or (len(group) > 1 and group is not groups[-1]):
                    return group
        return []

    def _groups(self, entries: Sequence[SegmentEntry]) -> list[list[SegmentEntry]]:
        """In order, each as long as rules 1 and 4 allow."""
        groups: list[list[SegmentEntry]] = []
        for entry in entries:
            if not groups or not self._fits(groups[-1], entry):
                groups.append([])
            groups[-1].append(entry)
        return groups

    def _fits(self, group: Sequence[SegmentEntry], entry: SegmentEntry) -> bool:
        both = (*group, entry)
        return (
            entry.first_revision == group[-1].last_revision + 1
            and all(each.site == self._segments.site and each.gathered_bytes for each in both)
            and entry.archived_ns - _begun_ns(group[0]) <= self._span_ns
            and sum(each.changes for each in both) <= self._changes_max
            and sum(each.gathered_bytes for each in both) <= self._bytes_max
        )


def _begun_ns(entry: SegmentEntry) -> int:
    return entry.merged_from_ns or entry.archived_ns


def _smaller_at_the_end(entries: Iterable[SegmentEntry], changes: int) -> list[SegmentEntry]:
    """Those behind the last one that has so many changes."""
    found: list[SegmentEntry] = []
    for entry in entries:
        if entry.changes >= changes:
            found = []
        else:
            found.append(entry)
    return found


def joined(segments: Sequence[Segment]) -> Segment:
    """One segment of neighbours, in order. A directory is where the first of them that names it has it, unless a record
    before has placed it: of that the reader's map knows."""
    directories: dict[int, Place] = {}
    placed: set[int] = set()
    entries: list[SlotEntry] = []
    for segment in segments:
        for ino, place in segment.directories.items():
            if ino not in placed:
                directories.setdefault(ino, place)
        for entry in segment.entries:
            for change in journal.decoded(entry.fields).changes:
                placed.update(places(change))
        entries += segment.entries
    return Segment(segments[0].first_revision, segments[-1].last_revision, directories, entries)
