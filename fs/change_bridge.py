"""The change log told to a log with transactions (Kafka), each record exactly once and in order.

Rules
1. The other log keeps the position together with what was sent: one transaction there has some records and the position
   after them, and is there as a whole or not at all.
2. One bridge of a group is at work, by the group's role in etcd. It opens the other log after it has the role; that
   ends what a bridge before it had begun there, and refuses whatever that one, if it is alive, still wants to commit.
3. The group's position in etcd follows what was sent, and comes by what is not selected without a transaction. So it
   may be before the other log's or behind it, but nothing is left out by either: who goes on takes the later one.
4. A group without a position in etcd begins anew, whatever the other log says: that is of before it was forgotten, and
   is replaced before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Protocol

import trio

from apollofs.fs.change_feed import FeedRequest, Progress, committed, first_position, selected
from apollofs.metadata.changes.groups import ConsumerGroup, open_group
from apollofs.metadata.changes.log import Batch, ChangeLog
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Store

BACKLOG_BATCHES = 8
"""So many batches are read ahead of what is being sent."""
SEND_RECORDS = 4000
"""A transaction is full at so many records; the batch that fills it goes with it."""


class Sink(Protocol):
    """A log with transactions, opened for one bridge."""

    @property
    def position(self) -> Position | None:
        """What the last transaction before this opening had; None if there is none."""
        ...

    async def send(self, records: Sequence[ChangeRecord], after: Position) -> None:
        """These records, and `after` as the position, in one transaction: all of it, or nothing. Raises UserError."""
        ...


OpenSink = Callable[[], AbstractAsyncContextManager[Sink]]


@dataclass(slots=True)
class BridgeReport:
    """What a bridge has done so far."""

    records: int = 0
    position: Position | None = None
    """Where the group goes on."""


async def bridge(
    store: Store, volume: str, changes: ChangeLog, request: FeedRequest, open_sink: OpenSink
) -> BridgeReport:
    """Send what is asked for, when no other reader has the group, from where it was left on.

    Raises ChangesLost, RoleLost, InvalidArgument, DeadlineExceeded, StoreError, ArchiveUnavailable, and what the sink
    raises. Cancelled it ends with a whole transaction, and the group's position behind it. Memory is bounded by
    BACKLOG_BATCHES and a transaction.
    """
    report = BridgeReport()
    async with open_group(store, Keys(volume), request.group) as group, open_sink() as sink:
        report.position = start = await _start(group, sink, changes, request)
        async with committed(group) as progress:
            await _send_all(changes, start, request, sink, progress, report)
    return report


async def _start(group: ConsumerGroup, sink: Sink, changes: ChangeLog, request: FeedRequest) -> Position:
    """Rules 3 and 4."""
    kept = await group.position()
    if kept is not None:
        return max(kept, sink.position or kept)
    start = await first_position(changes, request)
    await sink.send((), start)
    await group.commit(start)
    return start


async def _send_all(
    changes: ChangeLog, start: Position, request: FeedRequest, sink: Sink, progress: Progress, report: BridgeReport
) -> None:
    """Read and send side by side: what was read while a transaction was under way is the next one."""
    give, take = trio.open_memory_channel[Batch](BACKLOG_BATCHES)

    async def read() -> None:
        async with give, aclosing(selected(changes, start, request)) as batches:
            async for batch in batches:
                await give.send(batch)

    async with take, trio.open_nursery() as nursery:
        nursery.start_soon(read)
        async for batch in take:
            records, after = _gathered(batch, take)
            if records:
                await sink.send(records, after)
            progress.reach(after)
            report.records += len(records)
            report.position = after


def _gathered(batch: Batch, take: trio.MemoryReceiveChannel[Batch]) -> tuple[list[ChangeRecord], Position]:
    """This batch and those that wait behind it, up to a full transaction."""
    records, after = list(batch.records), batch.after
    while len(records) < SEND_RECORDS:
        try:
            more = take.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            break
        records += more.records
        after = more.after
    return records, after
