"""Reading the change log: archive and live history through one call, without a seam, in order, nothing left out.

Rules
1. The archive index says which segment holds a position, or that the log is archived further than that without anything
   having happened. Only what is not archived is read from etcd's history.
2. If etcd has forgotten what is asked of it, the index is read again: the archiver stores first, and lets etcd forget
   then. Only if the archive does not have it either is it lost, and `ChangesLost` says from where on there is
   something.
3. Where the log ends now, etcd does not tell a watch to which nothing happens. So who wants to stop there puts a mark
   into it, and reads up to that.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from apollofs.metadata import journal
from apollofs.metadata.changes.archive_index import ArchiveIndex, ArchiveState, unpacked
from apollofs.metadata.changes.directories import Directories
from apollofs.metadata.changes.history import mark_end, watched_slots
from apollofs.metadata.changes.port import SegmentSource
from apollofs.metadata.changes.position import REVISION_MAX, Position
from apollofs.metadata.changes.record import ChangeRecord, SlotEntry, entries_of
from apollofs.metadata.errors import (
    ArchiveUnavailable,
    ChangesLost,
    Compacted,
    InvalidArgument,
    NotFormatted,
)
from apollofs.metadata.journal import NAMESPACE_KINDS, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store

READ_S = 30.0
BATCH_RECORDS = 1000
"""From so many records on a batch is handed out."""
REREAD_MAX = 3
"""How often in a row a segment may have been removed just before it was read."""

MOVES = frozenset({Kind.RENAME, Kind.EXCHANGE})
HELD_BELOW = frozenset({Kind.SEAL, Kind.UNSEAL, Kind.POLICY, Kind.RETENTION})
"""What is done to a directory, and holds for what is below it."""
Selects = Callable[[ChangeRecord], bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in order; maybe none. `after` is where to go on when they have been dealt with."""

    records: tuple[ChangeRecord, ...]
    after: Position


class ChangeLog:
    """The change log of one volume, for one reader at a time: it keeps a map of directories for paths.

    Methods raise DeadlineExceeded, StoreError, CorruptRecord, UnsupportedFormat, and NotFormatted.
    """

    def __init__(self, store: Store, keys: Keys, segments: SegmentSource) -> None:
        self._store = store
        self._keys = keys
        self._segments = segments
        self._index = ArchiveIndex(store, keys)
        self._directories = Directories(store, keys)

    # -- positions ---------------------------------------------------------------------------------------------------

    async def beginning(self) -> Position:
        """Where the volume was made."""
        found = await retry(lambda: self._store.range(Range(self._keys.superblock)), READ_S)
        if not found.kvs:
            raise NotFormatted(f"there is no volume {self._keys.volume!r}: make it with `apollofs format`")
        return Position(found.kvs[0].create_revision)

    async def now(self) -> Position:
        """After everything that has happened before this call."""
        found = await retry(lambda: self._store.range(Range(self._keys.superblock)), READ_S)
        return Position(found.revision + 1)

    async def since(self, time_ns: int) -> Position:
        """Not after the first change of a time, as the mounts' clocks had it; where the archive knows better than the
        beginning, not long before. If what happened then may be lost it is in front of that: reading from there says
        so."""
        revision = (await self.beginning()).revision
        while True:
            page = await self._index.page(revision)
            for entry in page.entries:
                if entry.last_time_ns >= time_ns:
                    return _behind_what_is_lost(revision, entry.first_revision, page.state, time_ns)
                revision = entry.last_revision + 1
            if not page.more:
                return _behind_what_is_lost(revision, page.state.open_from, page.state, time_ns)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(
        self, start: Position, *, follow: bool = False, selects: Selects | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Every record from `start` on, up to the moment of the call, or without end (`follow`); only those that
        `selects` chooses. A generator: close it. Memory is bounded by a segment, or what a watch buffers.

        Raises ChangesLost where something is missing; what came before it has been handed out. So too for a position
        behind the end of the log.
        """
        self._check_begun(start, await self.now())
        until = REVISION_MAX if follow else 0
        position = start
        self._directories.begin({})  # an earlier reading may have come further
        while True:
            async with aclosing(self._archived(position, selects)) as batches:
                async for batch in batches:
                    yield batch
                    position = batch.after
            until = until or await mark_end(self._store, self._keys)
            if position.revision > until:
                return
            try:
                async with aclosing(self._live(position, until, selects)) as batches:
                    async for batch in batches:
                        yield batch
                        position = batch.after
                return
            except Compacted as exc:
                await self._check_archived(position, exc.first_revision)

    async def _archived(self, start: Position, selects: Selects | None) -> AsyncGenerator[Batch, None]:
        """What the archive has from `start` on; the last batch is where the live log goes on."""
        position, misses, more = start, 0, True
        while more:
            page = await self._index.page(position.revision)
            more = page.more
            for entry in page.entries:
                self._check_reaches(position, entry.first_revision)
                data = await self._segments.get(entry)
                if data is None:
                    # retention may have been quicker: then the index says so
                    misses, more = misses + 1, True
                    if misses > REREAD_MAX:
                        raise ArchiveUnavailable(f"segment {entry.name} of the change log is missing")
                    break
                segment, misses = unpacked(entry, data), 0
                self._directories.begin(segment.directories)
                records = self._records(segment.entries, position, entry.last_revision, selects)
                async with aclosing(records) as batches:
                    async for batch in batches:
                        yield batch
                position = max(position, Position(entry.last_revision + 1))
        yield Batch((), self._past_archive(position, page.state))

    def _check_begun(self, start: Position, now: Position) -> None:
        """A position that this log has given is not behind its end."""
        if start > now:
            raise ChangesLost(
                f"{start} is behind the end of the change log, {now}: that is a position of another volume, or etcd "
                "was restored from a backup, and what came after it is lost",
                str(now),
            )

    def _check_reaches(self, position: Position, first: int) -> None:
        if first > position.revision:
            found = Position(first)
            raise ChangesLost(
                f"the change log from {position} on is lost; it can be had again from {found} on", str(found)
            )

    def _past_archive(self, position: Position, state: ArchiveState) -> Position:
        """All segments are read; what the archive says of the time after them."""
        if position.revision > state.through:
            return position
        self._check_reaches(position, state.open_from)
        return Position(state.through + 1)

    async def _check_archived(self, position: Position, first: int) -> None:
        """etcd has forgotten what comes next. Return if the archive has it by now."""
        state = await self._index.state()
        if state.through < position.revision:
            self._check_reaches(position, max(first, position.revision + 1))

    async def _live(self, start: Position, until: int, selects: Selects | None) -> AsyncGenerator[Batch, None]:
        position = start
        async with watched_slots(self._store, self._keys, start.revision) as watched:
            async for found in watched:
                entries = list(entries_of(self._keys, found.events))
                async with aclosing(self._records(entries, position, found.revision, selects)) as batches:
                    async for batch in batches:
                        yield batch
                position = Position(found.revision + 1)
                if found.revision >= until:
                    return

    async def _records(
        self, entries: Sequence[SlotEntry], start: Position, last_revision: int, selects: Selects | None
    ) -> AsyncGenerator[Batch, None]:
        """The records of some transactions, in batches; the last one is complete up to and including a revision."""
        records: list[ChangeRecord] = []
        for entry in entries:
            await self._append(records, entry, start, selects)
            if len(records) >= BATCH_RECORDS:
                yield Batch(tuple(records), max(start, Position(entry.revision + 1)))
                records = []
        yield Batch(tuple(records), max(start, Position(last_revision + 1)))

    async def _append(
        self, records: list[ChangeRecord], entry: SlotEntry, start: Position, selects: Selects | None
    ) -> None:
        directories = self._directories
        slot = journal.decoded(entry.fields)
        for offset, change in enumerate(slot.changes):
            if change.kind not in NAMESPACE_KINDS:
                continue
            if not directories.know(change):
                await directories.prepare(change, entry.revision)
            position = Position(entry.revision, offset)
            if position >= start:
                path = directories.path(change.parent, change.name)
                old = directories.path(change.old_parent, change.old_name)
                record = ChangeRecord(position, entry.session, slot.site, change, path, old)
                if selects is None or selects(record):
                    records.append(record)
            directories.apply(change)


def _behind_what_is_lost(revision: int, first: int, state: ArchiveState, time_ns: int) -> Position:
    """What is wanted begins at a revision, and can be had from `first` on: that, if nothing of the time is lost."""
    return Position(max(revision, first) if state.lost_ns < time_ns else revision)


def within(path: bytes) -> Selects:
    """Selects what happens at a path of the volume and below it, as paths were at the time; renames into it and out of
    it; of directories above it the renames, which bring another subtree there or take it away, and what holds for all
    that is below them; and what has no known path, because it may be there.

    Empty components and "." mean nothing. Raises InvalidArgument for "..", which no path of the log has.
    """
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise InvalidArgument(f"{name_text(path)!r} is no path from the volume's root: it has '..' in it")
    exact = b"/" + b"/".join(names)
    inside = exact.rstrip(b"/") + b"/"
    above = {b"/" + b"/".join(names[:depth]) for depth in range(len(names))}

    def selects(record: ChangeRecord) -> bool:
        kind = record.change.kind
        if record.path is None or (record.old_path is None and kind in MOVES):
            return True
        paths = (record.path,) if record.old_path is None else (record.path, record.old_path)
        if any(each == exact or each.startswith(inside) for each in paths):
            return True
        return (kind in MOVES or kind in HELD_BELOW) and not above.isdisjoint(paths)

    return selects
