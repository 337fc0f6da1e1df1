"""The archiver: follows the live log, and stores it as segments.

Rules
1. One archiver works on a volume, by its role. What it stores counts when it is in the archive index, and a transaction
   of the role puts it there; so one that was frozen and wakes up changes nothing. The names of objects have the role's
   lease in them: nobody writes over another's.
2. It goes on where the index says that the archive ends. What was gathered and not stored when it ended is gathered
   again; an object that was stored and not put into the index is removed by the next one.
3. Small segments are merged (`merging.py`).
4. It never lets etcd forget what it has not archived (`compaction.py`). If others did, it says so, and goes on with the
   first that is left; a reader meets the gap as `ChangesLost`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from apollofs.metadata.changes.archive_index import ArchiveIndex, ArchiveState, SegmentEntry
from apollofs.metadata.changes.directories import Directories
from apollofs.metadata.changes.draft import Draft
from apollofs.metadata.changes.history import mark_end, watched_slots
from apollofs.metadata.changes.log import ChangeLog
from apollofs.metadata.changes.merging import Merger
from apollofs.metadata.changes.port import SegmentStore
from apollofs.metadata.changes.record import entries_of
from apollofs.metadata.changes.role import Role, held_role
from apollofs.metadata.changes.segment import pack
from apollofs.metadata.errors import ArchiveUnavailable, Compacted
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Store, WatchBatch

T = TypeVar("T")
log = logging.getLogger(__name__)
SEGMENT_PREFIX = "changes/"
FLUSH_S_MIN = 0.01
"""So long at least what comes next is waited for, or nothing ever came."""
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
REMOVED_AT_ONCE = 100
WHAT = "archives the change log"


@dataclass(frozen=True, slots=True)
class ArchiveOptions:
    """How the log is archived."""

    changes_max: int = 50_000
    """Changes in a segment (one transaction more may come along)."""
    gathered_bytes_max: int = 8 << 20
    """Of the transactions of a segment, in memory."""
    flush_s: float = 60.0
    """How long a change waits at most before it is archived."""
    keep_s: float = 0.0
    """Segments that were archived longer ago than this are removed; 0: never."""
    keep_bytes: int = 0
    """The oldest segments are removed as long as all together have more than this; 0: never."""
    lease_ttl_s: int = 15


@dataclass(slots=True)
class ArchiveReport:
    """What an archiver has done so far."""

    segments: int = 0
    changes: int = 0
    stored_bytes: int = 0
    removed_segments: int = 0
    orphans: int = 0
    """Objects that an archiver before has left, removed."""
    lost_revisions: int = 0
    """Compacted before they could be archived."""
    through: int = 0
    """The revision up to which the log is archived."""


class Archiver:
    """Archives the log of one volume. `report` may be read at any time."""

    def __init__(self, store: Store, keys: Keys, segments: SegmentStore, options: ArchiveOptions) -> None:
        self._store = store
        self._keys = keys
        self._segments = segments
        self._options = options
        self._index = ArchiveIndex(store, keys)
        self._directories = Directories(store, keys)
        self._state = ArchiveState()
        self._merger = self._new_merger()
        self.report = ArchiveReport()

    def _new_merger(self) -> Merger:
        options = self._options
        return Merger(self._index, self._segments, options.changes_max, options.gathered_bytes_max, options.keep_s)

    async def run(self, *, once: bool, wait: bool = True) -> None:
        """Become the archiver, and archive: everything up to now (`once`), or until cancelled. Cancelled or killed at
        any place, the next one goes on.

        Raises RoleTaken (`wait` not set), RoleLost, DeadlineExceeded, StoreError, NotFormatted; with `once`
        ArchiveUnavailable, otherwise the store of segments is waited for.
        """
        key = self._keys.archiver
        async with held_role(self._store, key, WHAT, self._options.lease_ttl_s, wait=wait) as role:
            changes = ChangeLog(self._store, self._keys, self._segments)
            beginning = (await changes.beginning()).revision
            self._state = await self._index.state()
            if not self._state.revision:
                self._state = await self._index.begin(role, beginning)
            self._merger = self._new_merger()
            await self._sweep(role, once=once)
            until = await mark_end(self._store, self._keys) if once else 0
            while not once or self._state.through < until:
                try:
                    await self._follow(role, until)
                except Compacted as exc:
                    await self._skip(role, exc.first_revision)

    async def _follow(self, role: Role, until: int) -> None:
        """Archive from where the archive ends; with `until`, up to that revision. Raises Compacted."""
        self._directories.begin({})  # it may be ahead: what was gathered and not stored is gathered again
        draft = Draft(self._directories, self._state.open_from)
        flush_s = max(self._options.flush_s, FLUSH_S_MIN)
        flush_at = trio.current_time() + flush_s
        async with watched_slots(self._store, self._keys, self._state.through + 1) as batches:
            while True:
                try:
                    batch = await self._next(batches, flush_at)
                except Compacted:
                    await self._flush(role, draft, once=bool(until))  # what was gathered is not lost
                    raise
                if batch is not None:
                    draft = await self._take(role, draft, batch, once=bool(until))
                ends = batch is not None and 0 < until <= batch.revision
                if ends or trio.current_time() >= flush_at:
                    draft = await self._flush(role, draft, once=bool(until))
                    await self._retire(role)
                    self._state = await self._merger.merge(role, self._state, SEGMENT_PREFIX)
                    flush_at = trio.current_time() + flush_s
                if ends:
                    return

    async def _next(self, batches: AsyncIterator[WatchBatch], deadline: float) -> WatchBatch | None:
        """What comes next; None at the deadline (by trio's clock)."""
        with trio.move_on_at(deadline):
            return await anext(batches)
        return None

    async def _take(self, role: Role, draft: Draft, batch: WatchBatch, *, once: bool) -> Draft:
        sizes = {event.kv.mod_revision: len(event.kv.value) for event in batch.events}
        for entry in entries_of(self._keys, batch.events):
            await draft.add(entry, sizes[entry.revision])
            if draft.changes >= self._options.changes_max or draft.size_bytes >= self._options.gathered_bytes_max:
                draft = await self._flush(role, draft, once=once)
        draft.through = batch.revision
        return draft

    async def _flush(self, role: Role, draft: Draft, *, once: bool) -> Draft:
        """Archive what was gathered; the next draft."""
        if not draft.entries:
            if draft.through > self._state.through:
                self._state = await self._index.advance(role, self._state, draft.through)
            self.report.through = self._state.through
            return draft
        data = pack(draft.segment())
        name = f"{SEGMENT_PREFIX}{draft.through:016x}-{role.token}"
        await self._persistently(partial(self._segments.put, name, data), once=once)
        entry = SegmentEntry(
            draft.first_revision,
            draft.through,
            draft.first_time_ns,
            draft.last_time_ns,
            draft.changes,
            len(data),
            self._segments.site,
            name,
            time.time_ns(),
            draft.size_bytes,
        )
        self._state = await self._index.add(role, self._state, entry)
        self._merger.note((entry,))
        self.report.segments += 1
        self.report.changes += draft.changes
        self.report.stored_bytes += len(data)
        self.report.through = self._state.through
        return Draft(self._directories, draft.through + 1)

    async def _skip(self, role: Role, first: int) -> None:
        """etcd has forgotten what was to be archived next."""
        first = max(first, self._state.through + 2)
        lost = first - 1 - self._state.through
        log.error(
            "changes of %d revisions, from %d on, were compacted before they were archived: the change log has a gap",
            lost,
            self._state.through + 1,
        )
        self.report.lost_revisions += lost
        self._state = await self._index.skip(role, self._state, first)

    # -- what goes ---------------------------------------------------------------------------------------------------

    async def _retire(self, role: Role) -> None:
        """Remove the oldest segments as retention says. An object that can't be deleted stays where it is: archiving
        does not wait for the store of another site, which may be lost. `_sweep` finds it when that site archives."""
        options = self._options
        if not options.keep_s and not options.keep_bytes:
            return
        if options.keep_bytes:
            self._state = await self._index.sized(self._state)
        total = self._state.size_bytes or 0
        old_ns = time.time_ns() - int(options.keep_s * 1e9)
        down: set[int] = set()
        while True:
            gone = []
            for entry in (await self._index.page(0, REMOVED_AT_ONCE)).entries:
                too_old = options.keep_s > 0 and entry.kept_since_ns < old_ns
                too_much = options.keep_bytes > 0 and total > options.keep_bytes
                if not too_old and not too_much:
                    break
                total -= entry.size_bytes
                gone.append(entry)
            if not gone:
                return
            self._state = await self._index.remove(role, self._state, gone)
            self._merger.forget(gone)
            for entry in gone:
                if entry.site not in down and not await self._delete(entry):
                    down.add(entry.site)
            self.report.removed_segments += len(gone)

    async def _delete(self, entry: SegmentEntry) -> bool:
        try:
            await self._segments.delete(entry)
        except ArchiveUnavailable as exc:
            log.warning("old segments stay in the store of site %d until that archives again: %s", entry.site, exc)
            return False
        return True

    async def _sweep(self, role: Role, *, once: bool) -> None:
        """Remove what an archiver before has stored and not put into the index: objects are listed first, then the role
        is proven, then the index is read; what is not in it then will never be."""
        names = set(await self._persistently(self._segments.names, once=once))
        if not names:
            return
        await role.commit((), ())
        revision, more = 0, True
        while more:
            page = await self._index.page(revision)
            names -= {entry.name for entry in page.entries}
            self._merger.note(page.entries)
            more = page.more
            revision = page.entries[-1].last_revision + 1 if page.entries else revision
        for name in names:
            await self._persistently(partial(self._segments.discard, name), once=once)
        self.report.orphans += len(names)

    async def _persistently(self, call: Callable[[], Awaitable[T]], *, once: bool) -> T:
        """A call of the store of segments; with `once` its first failure is told, otherwise it is tried again."""
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                return await call()
            except ArchiveUnavailable as exc:
                if once:
                    raise
                if backoff_s == BACKOFF_FIRST_S:
                    log.warning("the archive of the change log waits for its store: %s", exc)
            await trio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
