"""One operation, one transaction: decide, then commit.

An operation is two parts. *decide* is a pure function from a View (what is known) to a Decision (what to write, what
to record, what to reply) or to an error. *commit* sends it with compares of all that decide took from the view. If a
compare fails, the same transaction has read the truth, and the operation decides again on that; so a conflict costs
one round trip, and an error is only ever answered from one consistent, fresh read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import trio

from apollofs.metadata.errors import BodyConflict, DeadlineExceeded, NamespaceError, TooManyExtents
from apollofs.metadata.journal import Change
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Usage
from apollofs.metadata.session import Committed, Session, retry
from apollofs.metadata.store import Delete, KeyValue, Put, Range, RangeResult, Store
from apollofs.metadata.view import Recollection, Unread, View

T = TypeVar("T")
CONFLICTS_BEFORE_BACKOFF = 3
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


class Operation(Protocol[T]):
    """`decide` is pure, may be called any number of times, and raises NamespaceError leaves, or Unread by the view."""

    def decide(self, view: View) -> Decision[T]: ...


@dataclass(frozen=True, slots=True)
class Moment:
    """When and for whom an operation is decided; fixed before the first attempt."""

    now_ns: int
    session: int


class Transactor:
    """Runs operations for one mount. `session` is replaced when a lost one has been followed by a new one."""

    def __init__(self, store: Store, keys: Keys, recollection: Recollection, deadline_s: float) -> None:
        self._store = store
        self._keys = keys
        self.recollection = recollection
        self._deadline_s = deadline_s
        self.session: Session | None = None
        self.usage_bytes = 0
        self.usage_inodes = 0
        self._last_ns = 0

    def moment(self, session: Session) -> Moment:
        """The time now, never going back on this mount, so that a change always has a newer ctime."""
        self._last_ns = max(self._last_ns + 1, time.time_ns())
        return Moment(self._last_ns, session.number)

    async def run(self, session: Session, operation: Operation[T], *, time_ns: int) -> T:
        """Decide and commit, again after conflicts, until done or refused.

        Raises what `decide` raises (decided on fresh knowledge), SessionLost, DeadlineExceeded, StoreError.
        """
        view = View(self.recollection)
        deadline = trio.current_time() + self._deadline_s
        fresh = False
        conflicts = 0
        while True:
            view.reset()
            try:
                decision = operation.decide(view)
                if not decision.writes and view.guessed:
                    raise Unread
            except Unread:
                await self._refresh(view)
                fresh = True
                continue
            except (NamespaceError, BodyConflict, TooManyExtents):
                if fresh and not view.guessed:
                    raise
                await self._refresh(view)
                fresh = True
                continue
            if not decision.writes:
                return decision.reply(0, ())
            done = await self._commit(session, view, decision, time_ns)
            if done is not None:
                return await self._finish(decision, done)
            fresh = True
            conflicts += 1
            if trio.current_time() > deadline:
                raise DeadlineExceeded("others keep changing what this operation needs (it was not applied)")
            if conflicts > CONFLICTS_BEFORE_BACKOFF:
                await trio.sleep(random.random() * 0.001 * min(conflicts, 64))

    async def _commit(self, session: Session, view: View, decision: Decision[T], time_ns: int) -> Committed | None:
        questions = view.questions()
        outcome = await session.commit(
            view.compares(),
            (*decision.writes, *decision.reads),
            (decision.change,) if decision.change else (),
            time_ns=time_ns,
            orelse=questions,
        )
        if isinstance(outcome, Committed):
            return outcome
        view.learn(questions, outcome.ranges, outcome.revision)
        return None

    async def _finish(self, decision: Decision[T], done: Committed) -> T:
        for write in decision.writes:
            self._note(write, done.revision)
        self.usage_bytes += decision.usage.bytes
        self.usage_inodes += decision.usage.inodes
        ranges: Sequence[RangeResult | None] = ()
        if decision.reads:
            if done.ranges is None:
                ranges = (await self.read(decision.reads))[1]
            else:
                ranges = done.ranges[len(decision.writes) :]
        return decision.reply(done.revision, [found for found in ranges if found is not None])

    def _note(self, write: Put | Delete, revision: int) -> None:
        if isinstance(write, Put):
            # create_revision and version of our own write are not known, and nobody asks a recollection for them
            self.recollection.note(write.key, KeyValue(write.key, write.value, 0, revision, 0, write.lease), revision)
        elif not write.range_end:
            self.recollection.note(write.key, None, revision)

    async def _refresh(self, view: View) -> None:
        questions = view.questions()
        revision, answers = await self.read(questions)
        view.learn(questions, answers, revision)

    async def read(self, asked: Sequence[Range]) -> tuple[int, list[RangeResult]]:
        """Read all of `asked` as of one revision, in one request; repeated while the store is unreachable."""
        if len(asked) == 1:
            found: RangeResult = await retry(lambda: self._store.range(asked[0]), self._deadline_s)
            self.recollection.note_range(asked[0], found)
            return found.revision, [found]
        result = await retry(lambda: self._store.txn((), asked), self._deadline_s)
        answers = [answer for answer in result.ranges if answer is not None]
        for question, answer in zip(asked, answers, strict=True):
            self.recollection.note_range(question, answer)
        return result.revision, answers
