"""One operation, one transaction: decide, then commit.

An operation is two parts. *decide* is a pure function from a View (what is known) to a Decision (what to write, what
to record, what to reply) or to an error. *commit* sends it with compares of all that decide took from the view. If a
compare fails, the same transaction has read the truth, and the operation decides again on that; so a conflict costs
one round trip, and an error is only ever answered from one consistent, fresh read.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import trio

from apollofs.metadata.delegations import Delegations
from apollofs.metadata.errors import (
    BodyConflict,
    CorruptRecord,
    DeadlineExceeded,
    NamespaceError,
    TooManyExtents,
)
from apollofs.metadata.group_commit import GroupCommit, Request
from apollofs.metadata.groups import Claim
from apollofs.metadata.journal import Change
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Usage
from apollofs.metadata.session import Committed, Session, retry
from apollofs.metadata.store import Delete, KeyValue, Put, Range, RangeResult, Store
from apollofs.metadata.view import HeldView, NotHeld, Recollection, Unread, View

T = TypeVar("T")
log = logging.getLogger(__name__)
CONFLICTS_BEFORE_BACKOFF = 3
CLOCK_SET_NS = 1_000_000_000
"""A wall clock that is adjusted goes back by less than this."""
NO_USAGE = Usage(0, 0)


@dataclass(slots=True)
class Decision(Generic[T]):
    """What one operation does: all of it, or nothing.

    `reply` makes the answer from the revision of the transaction and the results of `reads`, which see its writes.
    Without any write the decision is an answer already, and must have been taken on a fresh view.
    """

    reply: Callable[[int, Sequence[RangeResult]], T]
    writes: list[Put | Delete] = field(default_factory=list)
    change: Change | None = None
    reads: tuple[Range, ...] = ()
    usage: Usage = NO_USAGE
    """By how much the operation changes what the volume holds."""
    born: int = 0
    """The directory that it makes."""
    rests_elsewhere: bool = False
    """It rests on groups that it doesn't write: so it is never queued, as what is queued compares only those."""
    further: tuple[Change, ...] = ()
    """What it does after `change`, if it does several things at once; then it `rests_elsewhere`."""


class Operation(Protocol[T]):
    """`decide` is pure, may be called any number of times, and raises NamespaceError leaves, or Unread by the view."""

    def decide(self, view: View) -> Decision[T]: ...


@dataclass(slots=True)
class _Attempt:
    """The state of one operation over its attempts."""

    view: View
    deadline: float
    time_ns: int
    claim: Claim
    conflicts: int = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """When and for whom an operation is decided; fixed before the first attempt."""

    now_ns: int
    session: int


class Transactor:
    """Runs operations for one mount."""

    def __init__(
        self, store: Store, keys: Keys, recollection: Recollection, delegations: Delegations, deadline_s: float
    ) -> None:
        self._store = store
        self._keys = keys
        self.recollection = recollection
        self._delegations = delegations
        self._ahead = delegations.ahead
        self._held = HeldView(keys, delegations.cache)
        self._group = GroupCommit(keys)
        self._deadline_s = deadline_s
        self._patience = delegations.patience
        self.usage_bytes = 0
        self.usage_inodes = 0
        self._last_ns = 0

    def statistics(self) -> dict[str, dict[str, float]]:
        """Counters of transactions, for `status`."""
        return {"commits": self._group.statistics(), "write_back": self._ahead.statistics()}

    def moment(self, session: Session) -> Moment:
        """The time now, never going back on this mount, so that a change always has a newer ctime; unless the clock was
        set back: a wrong time must not mark all that comes after it."""
        now_ns = time.time_ns()
        was_set = now_ns < self._last_ns - CLOCK_SET_NS
        self._last_ns = now_ns if was_set else max(self._last_ns + 1, now_ns)
        return Moment(self._last_ns, session.number)

    async def run(
        self, session: Session, operation: Operation[T], *, time_ns: int, at_once: bool = False, vies: bool = False
    ) -> T:
        """Decide and commit, again after conflicts, until done or refused. With `at_once` what this mount holds
        exclusively is answered before it is in the store. With `at_once` or `vies` it is one of the changes for which
        mounts that go on with them compete (`rivals.py`).

        Raises what `decide` raises (decided on fresh knowledge), SessionLost, DeadlineExceeded, StoreError.
        """
        while self._ahead.is_full:
            await self._ahead.settled()
        queued = self._queue(session, operation, time_ns)
        if queued is None and await self._turn(self._held.unheld, changes=at_once or vies):
            queued = self._queue(session, operation, time_ns)
        if queued is not None:
            place, reply = queued
            if not at_once:
                await self._ahead.settled(place)
            return reply
        await self._ahead.settled()  # nothing is done before what was answered before
        claim = self._delegations.new_claim()
        attempt = _Attempt(View(self.recollection), trio.current_time() + self._deadline_s, time_ns, claim)
        try:
            return await self._attempt(session, operation, attempt)
        finally:
            self._delegations.release(claim)
            if claim.waits:
                await self._delegations.recalls.leave_line(session, claim)

    async def _turn(self, group: int | None, *, changes: bool) -> bool:
        """If this mount competes with others for a group that it needs, wait for its turn: whether it has come."""
        if group is None:
            return False
        if changes:
            self._delegations.turns.rivals.changes(group)
        return await self._delegations.turns.have(group)

    def _queue(self, session: Session, operation: Operation[T], time_ns: int) -> tuple[int, T] | None:
        """Decide on what is held exclusively, and have it committed: its place in the queue (0: there is nothing to
        commit), and the reply. None where the store must be asked. No checkpoint."""
        ahead = self._ahead
        if not ahead.accepts(session):
            return None
        self._held.unheld = None
        try:
            decision = operation.decide(self._held)
        except (NotHeld, CorruptRecord):
            return None
        if not decision.writes:
            return 0, decision.reply(0, ())
        if decision.reads or decision.rests_elsewhere or not ahead.covers(decision.writes, decision.born):
            return None
        reply = decision.reply(ahead.revision, ())
        companions = self._delegations.write_ahead(session, decision.writes, decision.born)
        writes = (*decision.writes, *companions)
        place = ahead.add(
            writes, decision.change, time_ns, decision.born, lambda revision: self._landed(decision, revision)
        )
        self._delegations.trim()
        return place, reply

    async def _attempt(self, session: Session, operation: Operation[T], attempt: _Attempt) -> T:
        view = attempt.view
        while True:
            view.reset()
            try:
                decision = operation.decide(view)
                if not decision.writes and view.guessed:
                    raise Unread
            except Unread:
                await self._refresh(attempt)
                continue
            except (NamespaceError, BodyConflict, TooManyExtents, CorruptRecord):
                # records that were remembered at different times may contradict each other: only a fresh read decides
                if not view.guessed:
                    raise
                await self._refresh(attempt)
                continue
            if not decision.writes:
                return decision.reply(0, ())
            done = await self._commit(session, decision, attempt)
            if done is not None:
                return await self._finish(decision, done)
            attempt.conflicts += 1
            if trio.current_time() > attempt.deadline:
                raise DeadlineExceeded("others keep changing what this operation needs (it was not applied)")
            if attempt.conflicts > CONFLICTS_BEFORE_BACKOFF:
                await trio.sleep(random.random() * 0.001 * min(attempt.conflicts, 64))

    async def _commit(self, session: Session, decision: Decision[T], attempt: _Attempt) -> Committed | None:
        view, delegations = attempt.view, self._delegations
        compares = view.compares()
        if self._ahead.touches(compares, decision.writes, ()):
            await self._ahead.wait_for(compares, decision.writes)
            view.unlearn()
            return None
        guards, holders = delegations.guards(session, decision.writes, decision.born)
        questions = [*view.questions(), *holders]
        claims = delegations.exclusives.claim(session, decision.writes)
        companions = delegations.companions(session, decision.writes, decision.born)
        companions += [*(claim.put for claim in claims), *attempt.claim.waits.values()]
        request = Request(
            session,
            [*compares, *guards],
            (*decision.writes, *decision.reads, *companions),
            decision.change,
            attempt.time_ns,
            questions,
            further=decision.further,
        )
        pending = delegations.start_write(decision.writes)
        revision, applied = 0, None
        try:
            outcome = await self._group.commit(request)
            applied = isinstance(outcome, Committed)
            self._ahead.observe(outcome.revision)
            revision = outcome.revision if applied else 0
            decision.writes = [request.final.get(write.key, write) for write in decision.writes]
        finally:
            delegations.end_write(pending, decision.writes, revision, decision.born)
            delegations.exclusives.land(claims, applied=applied)
            if not revision and (session.in_doubt or request.error is not None):
                delegations.doubt()
        if isinstance(outcome, Committed):
            attempt.claim.waits.clear()
            return outcome
        known = len(questions) - len(holders)
        view.learn(questions[:known], outcome.ranges[:known], outcome.revision)
        held = [found for found in outcome.ranges[known:] if found is not None]
        if delegations.recalls.others(session, held):
            await delegations.recall_others(session, held, decision.writes, attempt.claim)
            view.unlearn()
        return None

    async def _finish(self, decision: Decision[T], done: Committed) -> T:
        self._landed(decision, done.revision)
        ranges: Sequence[RangeResult | None] = ()
        if decision.reads:
            if done.ranges is None:
                ranges = (await self.read(decision.reads))[1]
            else:
                first = len(decision.writes)
                ranges = done.ranges[first : first + len(decision.reads)]
        return decision.reply(done.revision, [found for found in ranges if found is not None])

    def _landed(self, decision: Decision[T], revision: int) -> None:
        """What it wrote is in the store."""
        for write in decision.writes:
            self._note(write, revision)
        self.usage_bytes += decision.usage.bytes
        self.usage_inodes += decision.usage.inodes

    def _note(self, write: Put | Delete, revision: int) -> None:
        if isinstance(write, Put):
            # create_revision and version of our own write are not known, and nobody asks a recollection for them
            self.recollection.note(write.key, KeyValue(write.key, write.value, 0, revision, 0, write.lease), revision)
        elif not write.range_end:
            self.recollection.note(write.key, None, revision)

    async def _refresh(self, attempt: _Attempt) -> None:
        questions = attempt.view.questions()
        # a turn would come after this operation if it waits in line already
        revision, answers = await self.read(questions, turns=not attempt.claim.waits)
        attempt.view.learn(questions, answers, revision)

    async def read(self, asked: Sequence[Range], *, turns: bool = True) -> tuple[int, list[RangeResult]]:
        """Read all of `asked` as of one revision, in one request; repeated while the store is unreachable.

        What another mount has answered ahead of the store, and what this one has, is in the store before. Where this
        mount competes for a group it has its turn first, unless `turns` is false.
        """
        if self._ahead.touches((), (), asked):
            await self._ahead.before_reading(asked)
        deadline = trio.current_time() + self._deadline_s
        exclusives = self._delegations.exclusives
        for group in exclusives.unheld(asked) if turns else ():
            await self._delegations.turns.have(group)
        while True:
            unheld = exclusives.unheld(asked)
            revision, answers = await self._read_once([*asked, *map(exclusives.holder_of, unheld)])
            others = exclusives.others(answers[len(asked) :])
            if others:
                if not turns or not await self._join(others):
                    await exclusives.ask_to_share(others)
            elif set(exclusives.unheld(asked)) <= set(unheld):
                break  # what needed no question was held all the time
            if trio.current_time() > deadline:
                raise DeadlineExceeded("another mount does not share what it holds exclusively")
        del answers[len(asked) :]
        self._ahead.observe(revision)
        for question, answer in zip(asked, answers, strict=True):
            self.recollection.note_range(question, answer)
        return revision, answers

    async def _join(self, holders: Sequence[tuple[int, int]]) -> bool:
        """Wait for this mount's turn on groups that others hold exclusively: whether any has come."""
        return any([await self._delegations.turns.have(group, joins=True) for group, _ in holders])

    async def _read_once(self, asked: Sequence[Range]) -> tuple[int, list[RangeResult]]:
        with self._patience.bounded():
            if len(asked) == 1:
                found: RangeResult = await retry(lambda: self._store.range(asked[0]), self._deadline_s)
                return found.revision, [found]
            result = await retry(lambda: self._store.txn((), asked), self._deadline_s)
        return result.revision, [answer for answer in result.ranges if answer is not None]
