"""Handing the change log to one consumer: from where, up to where, of which subtree, and for which group."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import trio

from apollofs.metadata.changes.groups import ConsumerGroup, open_group
from apollofs.metadata.changes.log import Batch, ChangeLog, within
from apollofs.metadata.changes.position import Position, parse_position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Store

COMMIT_EVERY_S = 0.5
CLOSE_S = 5.0
BEGINNING, NOW = "beginning", "now"

Deliver = Callable[[Sequence[ChangeRecord]], Awaitable[None]]
"""Takes records in order; when it returns they have been dealt with."""


@dataclass(frozen=True, slots=True)
class FeedRequest:
    """What a consumer wants."""

    start: str = BEGINNING
    """A position as text, BEGINNING or NOW; for a group only where it has none yet."""
    since_ns: int | None = None
    """From the first change of this time on, in place of `start`."""
    follow: bool = False
    """Go on with what comes, without end."""
    group: str = ""
    path: bytes = b"/"
    """What happens there and below."""

    def __post_init__(self) -> None:
        """Raises InvalidArgument for a path that means nothing: a group would come by everything."""
        within(self.path)


async def feed(store: Store, volume: str, changes: ChangeLog, request: FeedRequest, deliver: Deliver) -> None:
    """Deliver what is asked for. With a group: when no other reader has it, from its position on, and the position
    moves behind what was delivered, within COMMIT_EVERY_S, and at the end however that comes.

    Raises ChangesLost, RoleLost, InvalidArgument, DeadlineExceeded, StoreError, ArchiveUnavailable, and what `deliver`
    raises.
    """
    if not request.group:
        await _deliver(changes, await first_position(changes, request), request, deliver)
        return
    async with open_group(store, Keys(volume), request.group) as group:
        start = await group.position() or await first_position(changes, request)
        async with committed(group) as progress:
            await _deliver(changes, start, request, deliver, progress)


async def first_position(changes: ChangeLog, request: FeedRequest) -> Position:
    """Where who has no position yet begins. Raises InvalidArgument, DeadlineExceeded, StoreError."""
    if request.since_ns is not None:
        return await changes.since(request.since_ns)
    if request.start == BEGINNING:
        return await changes.beginning()
    return await changes.now() if request.start == NOW else parse_position(request.start)


async def selected(changes: ChangeLog, start: Position, request: FeedRequest) -> AsyncGenerator[Batch, None]:
    """What is asked for, from `start` on; batches without records too, for where to go on. A generator: close it."""
    selects = within(request.path) if request.path.strip(b"/") else None
    async with aclosing(changes.read(start, follow=request.follow, selects=selects)) as batches:
        async for batch in batches:
            since_ns = request.since_ns
            if since_ns is not None:
                batch = replace(
                    batch, records=tuple(record for record in batch.records if record.change.time_ns >= since_ns)
                )
            yield batch


async def _deliver(
    changes: ChangeLog, start: Position, request: FeedRequest, deliver: Deliver, progress: Progress | None = None
) -> None:
    async with aclosing(selected(changes, start, request)) as batches:
        async for batch in batches:
            if batch.records:
                await deliver(batch.records)
            if progress is not None:
                progress.reach(batch.after)


class Progress:
    """How far a group has come, and the task that commits it now and then."""

    def __init__(self, group: ConsumerGroup) -> None:
        self._group = group
        self._reached: Position | None = None
        self._committed: Position | None = None
        self._moved = trio.Event()

    def reach(self, position: Position) -> None:
        """All before `position` has been dealt with; it is committed soon."""
        self._reached = position
        self._moved.set()

    async def commit(self) -> None:
        """Raises RoleLost, DeadlineExceeded, StoreError."""
        reached = self._reached
        if reached is not None and reached != self._committed:
            await self._group.commit(reached)
            self._committed = reached

    async def serve(self) -> None:
        while True:
            await self._moved.wait()
            self._moved = trio.Event()
            await self.commit()
            await trio.sleep(COMMIT_EVERY_S)


@asynccontextmanager
async def committed(group: ConsumerGroup) -> AsyncIterator[Progress]:
    """What is reached in the block is committed in the group, at its end too."""
    progress = Progress(group)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(progress.serve)
            yield progress
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(CLOSE_S, shield=True):
            await progress.commit()
