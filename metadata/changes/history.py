"""The history of the journal slots, from a revision on and without end, as fast as etcd gives it.

etcd gives a watch that lags 1,000 revisions every 100 ms, and for each such portion it reads everything from the watch
that lags most up to now: who is far behind on one watch would need hours, and cost etcd the more the further behind. So
who is far behind opens many watches, *lanes*, each from where the one before ends; all of them are served by the same
reading. A lane is what one portion holds, and leaves the server with it: the next reading would only serve it with what
other lanes have. They are read one after the other, so the order is that of one watch. The last one has no end.

etcd does not tell a watch to which nothing happens how far it has come, so a mark is put behind all lanes that end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from apollofs.metadata import journal
from apollofs.metadata.errors import NotFormatted, StoreError
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Compare, Put, Range, Relation, Store, Target, WatchBatch, prefix_end

READ_S = 30.0
LANE_REVISIONS = 999
"""etcd's portion, but for the revision before the first, which a watch asks for too (`etcd_watch.py`)."""
LANES_MAX = 32
"""Each holds what etcd gives at once, and what a watch buffers at most."""
LAG_MIN = 4000
"""Nearer to the end one watch is as good."""


async def mark_end(store: Store, keys: Keys) -> int:
    """Put a mark at the end of the log; its revision. Raises NotFormatted, DeadlineExceeded, StoreError."""
    record = journal.encode(SlotRecord(0, 0, time.time_ns(), (Change(Kind.NOTHING),)))
    exists = Compare(keys.superblock, Target.VERSION, Relation.GREATER, 0)
    put = Put(keys.log_mark, record)
    result = await retry(lambda: store.txn((exists,), (put,)), READ_S)
    if not result.succeeded:
        raise NotFormatted(f"there is no volume {keys.volume!r}: make it with `apollofs format`")
    return result.revision


@asynccontextmanager
async def watched_slots(store: Store, keys: Keys, start: int) -> AsyncIterator[AsyncIterator[WatchBatch]]:
    """As the Store's `watch` of all journal slots from revision `start` on, Compacted included."""
    start = max(start, 1)
    newest = (await retry(lambda: store.range(Range(keys.superblock)), READ_S)).revision
    if newest - start < LAG_MIN:
        async with store.watch(keys.slots, prefix_end(keys.slots), start_revision=start) as batches:
            yield batches
        return
    lanes = Lanes(store, keys, start, await mark_end(store, keys))
    try:
        yield lanes
    finally:
        await lanes.aclose()


@dataclass(eq=False, slots=True)
class _Lane:
    """One watch; the last one does not end."""

    opened: AbstractAsyncContextManager[AsyncIterator[WatchBatch]]
    batches: AsyncIterator[WatchBatch]
    ready: deque[WatchBatch] = field(default_factory=deque)
    failure: StoreError | None = None
    is_over: bool = False
    begun: bool = False

    async def fetch(self) -> None:
        """Wait for the next batch. Cancelled, nothing is lost, and the watch stays at the server."""
        try:
            self.ready.append(await anext(self.batches))
        except StopAsyncIteration:
            self.is_over = True
        except StoreError as exc:
            self.failure = exc


class Lanes:
    """The batches of all lanes, in order. Whoever is cancelled while waiting for one may ask again."""

    def __init__(self, store: Store, keys: Keys, start: int, mark: int) -> None:
        self._store = store
        self._slots = keys.slots
        self._next = start
        self._mark = mark
        self._lanes: deque[_Lane] = deque()

    def __aiter__(self) -> AsyncIterator[WatchBatch]:
        return self

    async def __anext__(self) -> WatchBatch:
        while True:
            await self._open()
            head = self._lanes[0]
            if head.ready:
                return head.ready.popleft()
            if head.failure is not None:
                raise head.failure
            if head.is_over:
                self._lanes.popleft()
                await head.opened.__aexit__(None, None, None)
            else:
                await self._fetch(head)

    async def aclose(self) -> None:
        """Take all watches from the server."""
        with trio.CancelScope(shield=True):
            while self._lanes:
                await self._lanes.popleft().opened.__aexit__(None, None, None)

    async def _open(self) -> None:
        """As many lanes as there may be, and as there are revisions for; when half of them are read, so that many begin
        at a time."""
        if len(self._lanes) > LANES_MAX // 2:
            return
        while len(self._lanes) < LANES_MAX and self._next:
            last = self._next + LANE_REVISIONS - 1
            last = last if last < self._mark else 0
            slots = self._slots
            opened = self._store.watch(slots, prefix_end(slots), start_revision=self._next, last_revision=last)
            self._lanes.append(_Lane(opened, await opened.__aenter__()))
            self._next = last + 1 if last else 0

    async def _fetch(self, head: _Lane) -> None:
        """Wait until the first lane has something; those that are new begin meanwhile, at the server too."""
        beginning = [lane for lane in self._lanes if not lane.begun and lane is not head]
        if not beginning:
            await head.fetch()
            return
        async with trio.open_nursery() as nursery:
            for lane in beginning:
                nursery.start_soon(lane.fetch)
            await head.fetch()
            nursery.cancel_scope.cancel()
        for lane in (head, *beginning):
            lane.begun = True
