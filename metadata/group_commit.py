"""Group commit: operations of one mount that arrive while transactions are in flight go out together.

With fewer than SOLO_MAX transactions in flight an operation goes out at once, alone: an idle mount waits for nothing.
Otherwise it queues, and when a transaction returns, the operations at the head of the queue that do not touch each
other's keys become one transaction, with one journal record that holds all their changes. If a precondition of one of
them fails, nothing of the batch is applied, and each goes alone: an error reaches exactly whom it belongs to.

Whoever was in a batch comes back in a moment with the next operation. So while batches are the rule, the first to come
waits for the others for a small part of a round trip; if it went alone, they would wait a whole one for it.

A member waits for its batch without taking cancellation: its keys are changing, and only the outcome tells how.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import trio

from apollofs.metadata.errors import MetadataError, RequestTooLarge
from apollofs.metadata.journal import Change
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import Committed, Conflict, Session
from apollofs.metadata.store import OPS_MAX, REQUEST_BYTES_MAX, Compare, Delete, Op, Put, Range

log = logging.getLogger(__name__)
SOLO_MAX = 2
"""Transactions in flight from which on operations are gathered."""
GATHERING_PART = 0.1
"""Of the time that a transaction took last: for so long at most are others waited for."""
GATHERING_S_MAX = 0.003
RESERVED_OPS = 2
"""For the slot's own compare and put."""


@dataclass(slots=True)
class Request:
    """One operation's part of a transaction. `outcome` is set when `done` is; None: it must go alone."""

    session: Session
    compares: Sequence[Compare]
    then: Sequence[Op]
    change: Change | None
    time_ns: int
    orelse: Sequence[Op]
    done: trio.Event = field(default_factory=trio.Event)
    outcome: Committed | None = None
    error: MetadataError | None = None
    """The batch ended without a known outcome, or with the session."""
    final: dict[bytes, Put] = field(default_factory=dict)
    """Puts of the batch that stand for this request's put of the same key (directory times)."""
    leads: list[Request] | None = None
    """The batch that this request's task shall commit."""
    further: tuple[Change, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """All that it does, for the journal."""
        return (self.change, *self.further) if self.change else ()


class GroupCommit:
    """Sends the transactions of one mount."""

    def __init__(self, keys: Keys) -> None:
        self._times = keys.table(b"t")
        self._queue: deque[Request] = deque()
        self._in_flight = 0
        self._crowd = 1
        """How many operations the largest of the last transactions had; halved with each one since."""
        self._took_s = 0.0
        self.batches = 0
        self.batched = 0

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "in_flight": self._in_flight,
            "waiting": len(self._queue),
            "batches": self.batches,
            "batched": self.batched,
        }

    async def commit(self, request: Request) -> Committed | Conflict:
        """As `Session.commit`."""
        if self._in_flight < SOLO_MAX:
            if self._crowd < 2:
                return await self._alone(request)
            self._in_flight += 1
            self._queue.append(request)
            await self._gather()
        else:
            self._queue.append(request)
        with trio.CancelScope(shield=True):
            await request.done.wait()
        if request.leads is not None:
            await self._lead(request.leads)
        if request.error is not None:
            raise copy(request.error) from request.error
        if request.outcome is not None:
            return request.outcome
        return await self._alone(request)

    async def _gather(self) -> None:
        """Let others come, then send off the head of the queue. It counts as in flight already."""
        with trio.CancelScope(shield=True):
            await trio.sleep(min(GATHERING_PART * self._took_s, GATHERING_S_MAX))
        self._in_flight -= 1
        self._send_next()

    async def _alone(self, request: Request) -> Committed | Conflict:
        self._in_flight += 1
        began = trio.current_time()
        try:
            return await request.session.commit(
                request.compares, request.then, request.changes, time_ns=request.time_ns, orelse=request.orelse
            )
        finally:
            self._note(1, began)
            self._returned()

    def _note(self, operations: int, began: float) -> None:
        self._took_s = trio.current_time() - began
        self._crowd = max(operations, self._crowd // 2)

    def _returned(self) -> None:
        """A transaction has come back: the next batch may go."""
        self._in_flight -= 1
        self._send_next()

    def _send_next(self) -> None:
        if self._queue and self._in_flight < SOLO_MAX:
            batch = self._next_batch()
            batch[0].leads = batch
            self._in_flight += 1
            batch[0].done.set()

    async def _lead(self, batch: list[Request]) -> None:
        """Commit a batch, and tell its members. The batch counts as in flight already."""
        try:
            if len(batch) > 1:
                await self._together(batch)
        except RequestTooLarge as exc:
            log.info("a batch of %d was too large, its members go alone: %s", len(batch), exc)
        except MetadataError as exc:
            # it may have been applied: a member that tried again alone could meet its own work
            for member in batch:
                member.error = exc
        finally:
            for member in batch[1:]:
                member.done.set()
            self._returned()

    async def _together(self, batch: list[Request]) -> None:
        compares: dict[Compare, None] = {}
        then: list[Op] = []
        places: list[list[int]] = []
        times: dict[bytes, int] = {}
        for member in batch:
            compares.update(dict.fromkeys(member.compares))
            places.append([self._place(op, then, times) for op in member.then])
        changes = tuple(change for member in batch for change in member.changes)
        began = trio.current_time()
        with trio.CancelScope(shield=True):
            outcome = await batch[0].session.commit(tuple(compares), then, changes, time_ns=batch[0].time_ns)
        self._note(len(batch), began)
        if isinstance(outcome, Conflict):
            return
        self.batches += 1
        self.batched += len(batch)
        final = {key: put for key, at in times.items() if isinstance(put := then[at], Put)}
        for member, place in zip(batch, places, strict=True):
            member.final = final
            found = None if outcome.ranges is None else tuple(outcome.ranges[at] for at in place)
            member.outcome = Committed(outcome.revision, found)

    def _place(self, op: Op, then: list[Op], times: dict[bytes, int]) -> int:
        """Where an operation's op stands in the batch. Directory times, which all write blindly, are put once."""
        if isinstance(op, Put) and op.key.startswith(self._times):
            if op.key in times:
                then[times[op.key]] = op
                return times[op.key]
            times[op.key] = len(then)
        then.append(op)
        return len(then) - 1

    # -- what goes together ------------------------------------------------------------------------------------------

    def _next_batch(self) -> list[Request]:
        """From the head of the queue on, in order, until something does not fit."""
        batch = [self._queue.popleft()]
        written, known, ops, size = set[bytes](), set[Compare](), 0, 0
        ops, size = self._add(batch[0], written, known)
        while self._queue and batch[0].session is self._queue[0].session and self._is_plain(batch[0]):
            member = self._queue[0]
            if not self._is_plain(member) or self._touches(member, written, batch):
                break
            more_ops, more_size = self._add(member, set(), set())
            if ops + more_ops > OPS_MAX - RESERVED_OPS or size + more_size > REQUEST_BYTES_MAX // 2:
                break
            new = [compare for compare in member.compares if compare not in known]
            if len(known) + len(new) > OPS_MAX - RESERVED_OPS:
                break
            self._add(member, written, known)
            ops, size = ops + more_ops, size + more_size
            batch.append(self._queue.popleft())
        return batch

    def _add(self, member: Request, written: set[bytes], known: set[Compare]) -> tuple[int, int]:
        known.update(member.compares)
        written.update(self._written(member))
        size = sum(len(op.key) + len(op.value) for op in member.then if isinstance(op, Put))
        return len(member.then), size

    def _written(self, member: Request) -> list[bytes]:
        writes = (op for op in member.then if not isinstance(op, Range))
        return [op.key for op in writes if not op.key.startswith(self._times)]

    @staticmethod
    def _is_plain(member: Request) -> bool:
        """Reads must not see half of a batch, and deleted ranges can't be told apart from other members' keys."""
        return not any(isinstance(op, Range) or (isinstance(op, Delete) and op.range_end) for op in member.then)

    def _touches(self, member: Request, written: set[bytes], batch: list[Request]) -> bool:
        """Whether the member compares or writes what the batch writes, or the other way round."""
        mine = set(self._written(member))
        if mine & written:
            return True
        if any(_meets(compare, written) for compare in member.compares):
            return True
        return any(_meets(compare, mine) for other in batch for compare in other.compares)


def _meets(compare: Compare, keys: set[bytes]) -> bool:
    if not compare.range_end:
        return compare.key in keys
    return any(compare.key <= key < compare.range_end for key in keys)
