"""One inode's locks of one kind, on this mount.

Rules (`lock_ledger.py` and `lock_queue.py` have those of the store)
1. What this mount's owners hold is `held`, here; the store follows it. What others hold and want is the picture, which
   may lag: every grant compares that it does not matter, or is of a request that has its lock by its position.
2. Whatever decides or writes has `_turn`, and settles first what transactions that were given up have left in doubt.
3. A waiter looks again when the picture, `held`, or the queue of this mount changes so that nothing blocks it any more.
   Between looking and sleeping there is no await.
4. While there are waiters one of them reads the watch for all. When it leaves, another goes on.
5. A mount may decide *alone*: taken with a grant, where nobody else holds or wants anything, and nobody else is granted
   anything until its key says otherwise. Meanwhile locks and unlocks are of this mount only and cost no request. It is
   used only while the lease is proven.
6. Who wants something of a mount that decides alone puts a notice into its inbox, in a transaction that compares that
   it still does. That mount then *tells* (`tell`): one transaction says who holds and who waits there, since before
   anybody else. For a while it does not decide alone again, nor does the one who asked.
7. Where others wait, it may all the same decide alone for a moment: in its turn (`lock_turns.py`).

Order: `_turn`, then the session's slots.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import trio

from apollofs.metadata.errors import (
    LockConflict,
    LockDeadlock,
    MetadataError,
    TooManyLocks,
)
from apollofs.metadata.lock_ledger import Ledger
from apollofs.metadata.lock_picture import SOLE_OWNER, Keeper, Waiting
from apollofs.metadata.lock_powers import Powers
from apollofs.metadata.lock_queue import Waiter, ahead_of, blocked, has_lock, passed_over
from apollofs.metadata.lock_ranges import add, blockers, conflict, covers, subtract, weakens
from apollofs.metadata.lock_recall import ask_to_tell, compare_keeper, notice, tell
from apollofs.metadata.lock_records import RANGE_END, Arrival, Lock, LockKind, check_count, encode_waiting
from apollofs.metadata.lock_turns import excludes_everybody, slice_until, step_behind
from apollofs.metadata.lock_watch import LockWatch
from apollofs.metadata.session import Committed, Conflict
from apollofs.metadata.store import Compare, Delete, Op, Put, Relation, Target

log = logging.getLogger(__name__)
SETTLE_S = 10.0
"""How long an interrupted call may take to undo what it left in the store; what is left then waits for the next."""
PASSED_MAX = 100


class Board:
    """See the module. Belongs to one session and ends with it. All calls raise SessionLost, StoreError,
    DeadlineExceeded, CorruptRecord besides what is named."""

    def __init__(self, ledger: Ledger, kind: LockKind, powers: Powers) -> None:
        self.ino = ledger.ino
        self.kind = kind
        self._ledger = ledger
        self._picture = ledger.picture
        self._powers = powers
        self._watch = LockWatch(ledger)
        self._turn = trio.Lock()
        self.held: tuple[Lock, ...] = ()
        self.alone = False
        """This mount decides alone (rule 5), or does so for all it knows: then something is in doubt."""
        self._turn_ends = 0.0
        """Until when, by trio's clock, it does so in its turn; 0: not in a turn."""
        self._must_pass_on = False
        """What is held was told when this mount decided alone: its end begins no turn."""
        self.waiters: list[Waiter] = []
        self._watcher: Waiter | None = None
        self.users = 0
        self.acquiring: Counter[int] = Counter()
        """Owners whose `acquire` is under way."""

    @property
    def settled(self) -> bool:
        return self._ledger.settled

    @property
    def idle(self) -> bool:
        """Nobody uses, holds or wants anything here."""
        return self.users == 0 and not self.held and not self.waiters and self.settled

    @property
    def is_watching(self) -> bool:
        return self._watch.is_open

    # -- calls -------------------------------------------------------------------------------------------------------

    async def acquire(self, wanted: Lock, *, wait: bool, deadlocked: Callable[[Waiter], bool]) -> None:
        """Raises LockConflict, LockDeadlock, TooManyLocks; see `LockManager.acquire`.

        `deadlocked` says whether a request, which waits from now on, would do so for ever.
        """
        async with self._turn:
            await self.settle()
            if covers(self.held, wanted):
                return
            if await self._try(wanted, ask=not wait):
                return
            if not wait:
                await self._keep_only(self._without_converted(wanted))  # flock(2): given up before the new one is had
                raise LockConflict("another owner holds or awaits a conflicting lock")
            waiter = await self._enqueue(wanted)
        try:
            if deadlocked(waiter):
                raise LockDeadlock("the owners would wait for each other")
            await self._await_grant(waiter)
        except BaseException:
            self._leave(waiter)
            raise
        finally:
            self.waiters.remove(waiter)
            self.announce()

    async def release(self, owner: int, start: int, end: int) -> None:
        """One transaction, or none. Whatever is raised, the owner holds nothing in the range any more; if it could not
        be told to the store, `settle` does it later."""
        with trio.CancelScope(shield=True):
            await self._turn.acquire()  # a close that is interrupted must not leave a lock behind
        try:
            left = subtract(self.held, owner, start, end)
            check_count(left)  # a split may make one too many
            await self._keep_only(left)
        finally:
            self._turn.release()

    async def test(self, wanted: Lock) -> Iterator[Lock]:
        """All locks that stand in the way. One request, or none if this mount decides alone."""
        async with self._turn:
            if not (self.alone and self.settled and self._ledger.session.proven):
                await self._ledger.read()
                while self._picture.keeper is not None:
                    await self._ask_keeper()
            holders, queue = self._standing()
            by_place = [each.lock for each in queue if has_lock(each, holders, queue)]
            return (lock for lock in chain(holders, by_place) if conflict(lock, wanted))

    async def tell(self) -> None:
        """Decide alone no more (rule 6), when this mount's turn is over. One transaction, in a turn a request before
        it, more if very many wait; none if it is so already."""
        while True:
            async with self._turn:
                await self.settle()
                if self.alone and self._turn_ends <= trio.current_time():
                    await self._tell()
                if not self.alone:
                    return
            await trio.sleep_until(self._turn_ends)

    async def settle(self) -> None:
        """Take back what transactions that were given up, and requests that wait no more, may have left in the store.
        No request if there is nothing. For the holder of `_turn`, or for one who knows that nobody holds it."""
        while not self.settled:
            self._ledger.check_session()
            if self.alone and self._ledger.doubtful:
                await self._tell()
            else:
                await self._ledger.mend(self.held)

    async def clean_up(self) -> None:
        """After a call that failed or was interrupted: `settle`, bounded and shielded; what fails is left for later."""
        if self.settled or self._ledger.ended or not self._ledger.session.alive:
            return
        with trio.move_on_after(SETTLE_S, shield=True):
            try:
                async with self._turn:
                    await self.settle()
            except MetadataError as exc:
                log.info("locks of inode %d are still to be settled: %s", self.ino, exc)

    async def rest(self) -> None:
        """Nobody has waited here for some time: close the watch."""
        if self._watcher is None:
            await self._watch.close()

    def end(self) -> None:
        """The session has ended: nothing is held, and who waits gets SessionLost. No await."""
        self._ledger.ended = True
        self.held = ()
        self.alone = False
        for waiter in self.waiters:
            waiter.wake()

    def announce(self) -> None:
        """Wake the waiters that nothing blocks any more, and one to read the watch if nobody does."""
        holders, queue = self._standing()
        for waiter in self.waiters:
            if not waiter.ready.is_set() and not blocked(waiter, holders, queue):
                waiter.wake()
        if self.alone or self._watcher is not None or not self.waiters:
            return
        if not any(each.ready.is_set() for each in self.waiters):
            self.waiters[-1].wake()  # the newest waits longest: the watch changes hands as rarely as can be

    def blockers(self, wanted: Lock, arrival: Arrival | None = None) -> Iterator[Lock]:
        """What `wanted` has to wait for as far as is known here; `arrival` None: it is not in the queue."""
        holders, queue = self._standing()
        return blockers(wanted, holders, (each.lock for each in ahead_of(arrival, queue)))

    def _standing(self) -> tuple[tuple[Lock, ...], list[Waiting]]:
        """All locks held, and all requests in order of arrival."""
        queue = [waiter.place for waiter in self.waiters]
        holders = self.held
        if not (self.alone and self.settled):  # in a turn the others' requests stay where they are, and count later
            queue += self._picture.waiting
            holders = (*holders, *self._picture.held)
        queue.sort(key=lambda waiting: waiting.arrival)
        return holders, queue

    @property
    def waiting_elsewhere(self) -> Iterator[Waiting]:
        """Requests of other mounts that wait here."""
        return self._picture.waiting

    # -- deciding ----------------------------------------------------------------------------------------------------

    async def _try(self, wanted: Lock, waiter: Waiter | None = None, *, ask: bool) -> bool:
        """Grant the lock if nothing blocks it. `ask`: don't believe that others block it without having asked."""
        arrival = waiter.arrival if waiter else None
        asked = not ask
        while True:
            blocker = next(self.blockers(wanted, arrival), None)
            if blocker is None:
                if await self._grant(wanted, waiter):
                    return True
                asked = True
                await self.settle()
            elif ask and blocker.owner == SOLE_OWNER:
                await self._ask_keeper()
                await self.settle()
            elif not asked and blocker.session != self._ledger.session.number:
                await self._ledger.read()
                asked = True
            else:
                return False

    async def _grant(self, wanted: Lock, waiter: Waiter | None) -> bool:
        """One transaction, or none. False: somebody else has changed something, which is now known; or try again."""
        after = add(self.held, wanted)
        check_count(after)
        if self.alone and not self._ledger.session.proven:
            await self._tell()
            return False
        if not self.alone:
            outcome = await self._grant_in_store(wanted, after, waiter)
            if isinstance(outcome, Conflict):
                return False
            self._must_pass_on = False
        self.held = after
        return True

    async def _grant_in_store(
        self, wanted: Lock, after: tuple[Lock, ...], waiter: Waiter | None
    ) -> Committed | Conflict | None:
        """None: nothing had to be written."""
        if self._picture.alone and self._powers.may_decide_alone(self.ino, self.kind):
            compares = self._ledger.places.others_unchanged_since(self._picture.revision, queued=False)
            return await self._decide_alone(compares)
        holders, queue = self._standing()
        if waiter is not None and self._has_by_place(waiter, holders, queue):
            return None
        passed = passed_over(wanted, self.held, ahead_of(waiter.arrival if waiter else None, queue))
        if len(passed) > PASSED_MAX:
            raise TooManyLocks("too many requests wait for each other")
        compares = (
            *self._ledger.places.others_unchanged_since(self._picture.revision, queued=waiter is not None),
            *(Compare(key, Target.CREATE, Relation.GREATER, 0) for key in passed),
        )
        outcome = await self._ledger.write(after, (Delete(waiter.key),) if waiter else (), compares)
        if waiter is not None and isinstance(outcome, Committed):
            self._ledger.placed.discard(waiter.key)
        return outcome

    def _has_by_place(self, waiter: Waiter, holders: Iterable[Lock], queue: list[Waiting]) -> bool:
        if not self._ledger.session.proven or weakens(self.held, waiter.lock):
            return False
        return has_lock(waiter.place, holders, queue) and self._ledger.hold_by_place(waiter.key)

    async def _keep_only(self, left: tuple[Lock, ...]) -> None:
        if left == self.held:
            return
        has_turn = self._has_turn(left)
        self.held = left
        try:
            if has_turn:
                await self._begin_turn()
            await self.settle()
            if not left and next(self._picture.waiting, None) is not None and not (self.alone and self.waiters):
                self._powers.passed_on()
                if self.alone:
                    await self._tell()
            while not self.alone and not self._ledger.says(self.held):
                outcome = await self._ledger.write(self.held, (self._ledger.question,))
                if isinstance(outcome, Committed) and outcome.ranges is not None:
                    await self._ledger.see(outcome)  # for free, and the next request knows who waits
                await self.settle()
        except BaseException:
            self._ledger.doubtful = True  # the own key must still be told
            raise
        finally:
            self.announce()

    def _without_converted(self, wanted: Lock) -> tuple[Lock, ...]:
        return subtract(self.held, wanted.owner, 0, RANGE_END) if self.kind is LockKind.FLOCK else self.held

    # -- deciding alone ----------------------------------------------------------------------------------------------

    async def _decide_alone(self, compares: Iterable[Compare]) -> Committed | Conflict:
        """From now on, if the comparisons hold."""
        try:
            outcome = await self._ledger.write_sole(tuple(compares))
        except BaseException:
            self._is_alone()  # it may be so: `settle` tells, and puts back the requests that may have gone
            raise
        if isinstance(outcome, Committed):
            self._is_alone()
        else:
            self._turn_ends = 0.0
        return outcome

    async def _begin_turn(self) -> None:
        began = trio.current_time()
        if isinstance(await self._decide_alone(()), Committed):
            self._turn_ends = max(self._turn_ends, slice_until(began))

    def _is_alone(self) -> None:
        if not self._ledger.ended:
            self.alone = True
            for each in self.waiters:
                each.placed = False

    def _has_turn(self, left: tuple[Lock, ...]) -> bool:
        """Whether a turn begins with what is given back (`lock_turns.py`). No checkpoint between this and the
        transaction."""
        if self.alone or self._must_pass_on or left or not self.waiters or not self.settled:
            return False
        if not excludes_everybody(self.held):
            return False
        self._turn_ends = self._powers.turn_begins(self.ino, self.kind)
        return self._turn_ends > 0

    async def _tell(self) -> None:
        """See `tell`. If it is refused, the next `settle` does it again."""
        waiters = [waiter for waiter in self.waiters if not waiter.placed]
        in_turn, self._turn_ends = bool(self._turn_ends), 0.0
        if in_turn and waiters:
            await step_behind(self._ledger, waiters, self._powers.new_ticket)
        if await tell(self._ledger, self.held, waiters, self.waiters):
            self.alone, self._must_pass_on = False, bool(self.held)
            self.announce()

    async def _ask_keeper(self) -> None:
        """Have the mount that decides alone tell, and wait until it has. Raises DeadlineExceeded."""
        self._powers.has_asked(self.ino, self.kind)
        await ask_to_tell(self._ledger)

    # -- waiting -----------------------------------------------------------------------------------------------------

    async def _enqueue(self, wanted: Lock) -> Waiter:
        """Put the request into the queue, the store's unless this mount decides alone, and see how things stand as of
        that. One transaction, or none."""
        ticket = self._powers.new_ticket()
        waiter = Waiter(self._ledger.places.waiter(ticket), wanted, Arrival(0), placed=not self.alone)
        if self.alone:
            waiter.arrival = Arrival(self._ledger.known, ticket)
            self.held = self._without_converted(wanted)
            self.waiters.append(waiter)
            self.announce()
            return waiter
        try:
            outcome, asked = await self._put_in_queue(waiter)
        except BaseException:
            self._ledger.strays.add(waiter.key)
            raise
        self.held = self._without_converted(wanted)
        waiter.arrival = Arrival(outcome.revision)
        self._ledger.placed.add(waiter.key)
        self.waiters.append(waiter)
        try:
            await self._ledger.see(outcome)
            if self._picture.keeper is not None and self._picture.keeper != asked:
                self._powers.has_asked(self.ino, self.kind)
                await ask_to_tell(self._ledger, wait=False)
        except BaseException:
            self.waiters.remove(waiter)
            self._leave(waiter)
            raise
        finally:
            self.announce()
        return waiter

    async def _put_in_queue(self, waiter: Waiter) -> tuple[Committed, Keeper | None]:
        """With it goes a notice to the mount that decides alone, if there is one and it is known."""
        ledger = self._ledger
        put = Put(waiter.key, encode_waiting(waiter.lock), ledger.session.lease_id)
        after = self._without_converted(waiter.lock)
        while True:
            keeper = self._picture.keeper
            writes: list[Op] = [put]
            compares: list[Compare] = []
            if keeper is not None:
                compares.append(compare_keeper(keeper))
                writes.append(Put(notice(ledger, keeper.session), b"", ledger.session.lease_id))
                self._powers.has_asked(self.ino, self.kind)
            writes.append(ledger.question)
            if after == self.held:
                outcome = await ledger.commit(compares, writes)
            else:
                outcome = await ledger.write(after, writes, compares)
            if isinstance(outcome, Committed):
                return outcome, keeper
            await self.settle()

    def _leave(self, waiter: Waiter) -> None:
        """It waits no more, and may still be in the store."""
        if waiter.placed or self._ledger.doubtful:
            self._ledger.placed.discard(waiter.key)
            self._ledger.strays.add(waiter.key)

    async def _await_grant(self, waiter: Waiter) -> None:
        while True:
            async with self._turn:
                self._ledger.check_session()
                await self.settle()
                if await self._try(waiter.lock, waiter, ask=False):
                    return
                waiter.ready = trio.Event()
                waiter.sleeps = True
            if self.alone or self._watcher is not None:
                await waiter.ready.wait()
            else:
                await self._watch_until_ready(waiter)

    async def _watch_until_ready(self, waiter: Waiter) -> None:
        self._watcher = waiter
        try:
            with trio.CancelScope() as waiter.watching:
                while True:
                    await self._watch.changed()
                    self.announce()
        finally:
            self._watcher = None
            waiter.watching = None
