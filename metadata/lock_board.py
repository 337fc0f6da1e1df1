"""One inode's locks of one kind, on this mount.

Rules
1. What this mount's owners hold is `held`, here; the session's key in the store follows it. What others hold and want
   is the picture, which may lag: every grant compares that it does not matter.
2. Transactions of one board go one after the other (`_turn`), and each compares the mod_revision of the session's own
   key. Nobody else writes that key.
3. A transaction that was given up may still be applied. Before anything else is decided the own key is then put anew,
   as `held` says: a copy that was applied before is overwritten, one that comes later fails on the compare. So that its
   revision never is 0 again, such a key is emptied from then on, not deleted; the session's end deletes it.
4. A waiter looks again when the picture, `held`, or the queue of this mount changes so that nothing blocks it any more.
   Between looking and sleeping there is no await.
5. While there are waiters one of them reads the watch for all. When it leaves, another goes on from the picture's
   revision.

Order: `_turn`, then the session's slots.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import trio

from apollofs.metadata.errors import (
    Compacted,
    LockConflict,
    LockDeadlock,
    MetadataError,
    OutcomeUnknown,
    SessionLost,
    StoreUnavailable,
)
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_picture import Picture, Places, Waiting
from apollofs.metadata.lock_queue import Waiter, ahead_of, blocked
from apollofs.metadata.lock_ranges import add, blockers, covers, subtract
from apollofs.metadata.lock_records import RANGE_END, Lock, LockKind, encode_held, encode_waiting
from apollofs.metadata.session import Committed, Conflict, Session, SessionOptions, retry
from apollofs.metadata.store import Compare, Delete, Op, Put, Range, RangeResult, Relation, Store, Target

log = logging.getLogger(__name__)
SETTLE_S = 10.0
"""How long an interrupted call may take to undo what it left in the store; what is left then waits for the next."""
STRAYS_MAX = 64
"""Keys that one transaction clears away."""
REWATCH_S = 0.5


class Board:
    """See the module. Belongs to one session and ends with it. All calls raise SessionLost, StoreError,
    DeadlineExceeded, CorruptRecord besides what is named."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        options: SessionOptions,
        session: Session,
        ino: int,
        kind: LockKind,
        new_ticket: Callable[[], int],
    ) -> None:
        """`new_ticket` gives a number that no request of the session had before."""
        self._store = store
        self._options = options
        self._session = session
        self.ino = ino
        self.kind = kind
        self._new_ticket = new_ticket
        self._places = Places(keys, ino, kind, session.number)
        self._picture = Picture(self._places)
        self._turn = trio.Lock()
        self.held: tuple[Lock, ...] = ()
        self._stored: tuple[Lock, ...] = ()
        """What the own key says."""
        self._known = 0
        """Its mod_revision; 0: it is not there."""
        self._keep_key = False
        self._doubtful = False
        self._strays: set[bytes] = set()
        """Keys of requests that wait no more and may still be in the store."""
        self.waiters: list[Waiter] = []
        self._watcher: Waiter | None = None
        self._ended = False
        self.users = 0
        self.acquiring: Counter[int] = Counter()
        """Owners whose `acquire` is under way."""

    @property
    def settled(self) -> bool:
        return not self._doubtful and not self._strays

    @property
    def idle(self) -> bool:
        """Nothing here is worth remembering."""
        return self.users == 0 and not self.held and not self.waiters and self.settled

    # -- calls -------------------------------------------------------------------------------------------------------

    async def acquire(self, wanted: Lock, *, wait: bool, deadlocked: Callable[[Waiter], bool]) -> None:
        """Raises LockConflict, LockDeadlock, TooManyLocks; see `LockManager.acquire`.

        `deadlocked` says whether a request, which waits from now on, would do so for ever.
        """
        async with self._turn:
            await self.settle()
            if covers(self.held, wanted):
                return
            if await self._try(wanted, look=not wait):
                return
            if not wait:
                await self._convert_in_vain(wanted)
                raise LockConflict("another owner holds or awaits a conflicting lock")
            waiter = await self._enqueue(wanted)
        try:
            if deadlocked(waiter):
                raise LockDeadlock("the owners would wait for each other")
            await self._await_grant(waiter)
        except BaseException:
            self._strays.add(waiter.key)
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
            encode_held(self._session.number, left)  # a split may make one too many
            await self._keep_only(left)
        finally:
            self._turn.release()

    async def settle(self) -> None:
        """Take back what transactions that were given up, and requests that wait no more, may have left in the store.
        No request if there is nothing. For the holder of `_turn`, or for one who knows that nobody holds it."""
        while not self.settled:
            self._check_session()
            strays = tuple(self._strays)[:STRAYS_MAX]
            writes: list[Op] = [Delete(key) for key in strays]
            if self._doubtful:
                self._keep_key = True
                outcome = await self._write(self.held, writes)
            else:
                outcome = await self._commit((), writes)
            if isinstance(outcome, Committed):
                self._doubtful = False
                self._strays.difference_update(strays)

    async def clean_up(self) -> None:
        """After a call that failed or was interrupted: `settle`, bounded and shielded; what fails is left for later."""
        if self.settled or self._ended or not self._session.alive:
            return
        with trio.move_on_after(SETTLE_S, shield=True):
            try:
                async with self._turn:
                    await self.settle()
            except MetadataError as exc:
                log.info("locks of inode %d are still to be settled: %s", self.ino, exc)

    def end(self) -> None:
        """The session has ended: nothing is held, and who waits gets SessionLost. No await."""
        self._ended = True
        self.held = ()
        for waiter in self.waiters:
            waiter.wake()

    def announce(self) -> None:
        """Wake the waiters that nothing blocks any more, and one to read the watch if nobody does."""
        holders, queue = self._standing()
        for waiter in self.waiters:
            if not waiter.ready.is_set() and not blocked(waiter, holders, queue):
                waiter.wake()
        if self._watcher is None and self.waiters and not any(each.ready.is_set() for each in self.waiters):
            self.waiters[-1].wake()  # the newest waits longest: the watch changes hands as rarely as can be

    def blockers(self, wanted: Lock, arrival: int | None = None) -> Iterator[Lock]:
        """What `wanted` has to wait for as far as is known here; `arrival` None: it is not in the queue."""
        holders, queue = self._standing()
        return blockers(wanted, holders, ahead_of(arrival, queue))

    def _standing(self) -> tuple[tuple[Lock, ...], list[Waiting]]:
        """All locks held, and all requests in order of arrival."""
        queue = [*self._picture.waiting, *(Waiting(each.arrival, each.lock) for each in self.waiters)]
        queue.sort(key=lambda waiting: waiting.arrival)
        return (*self.held, *self._picture.held), queue

    @property
    def waiting_elsewhere(self) -> Iterator[Waiting]:
        """Requests of other mounts that wait here."""
        return self._picture.waiting

    # -- deciding ----------------------------------------------------------------------------------------------------

    async def _try(self, wanted: Lock, waiter: Waiter | None = None, *, look: bool) -> bool:
        """Grant the lock if nothing blocks it. `look`: don't believe that others block it without having asked."""
        arrival = waiter.arrival if waiter else None
        while True:
            blocker = next(self.blockers(wanted, arrival), None)
            if blocker is None:
                if await self._grant(wanted, waiter):
                    return True
                look = False
                await self.settle()
            elif look and blocker.session != self._session.number:
                await self._read()
                look = False
            else:
                return False

    async def _grant(self, wanted: Lock, waiter: Waiter | None) -> bool:
        """One transaction. False: somebody else has changed something, which is now known."""
        after = add(self.held, wanted)
        writes = (Delete(waiter.key),) if waiter else ()
        compares = self._places.others_unchanged_since(self._picture.revision, queued=waiter is not None)
        if isinstance(await self._write(after, writes, compares), Conflict):
            return False
        self.held = after
        return True

    async def _convert_in_vain(self, wanted: Lock) -> None:
        """flock(2): the lock that was to be converted is given up before the new one is had."""
        await self._keep_only(self._without_converted(wanted))

    async def _keep_only(self, left: tuple[Lock, ...]) -> None:
        if left == self.held:
            return
        self.held = left
        try:
            await self.settle()
            while self._stored != self.held:
                await self._write(self.held)
                await self.settle()
        except BaseException:
            self._doubtful = True  # the own key must still be told
            raise
        finally:
            self.announce()

    def _without_converted(self, wanted: Lock) -> tuple[Lock, ...]:
        return subtract(self.held, wanted.owner, 0, RANGE_END) if self.kind is LockKind.FLOCK else self.held

    # -- waiting -----------------------------------------------------------------------------------------------------

    async def _enqueue(self, wanted: Lock) -> Waiter:
        """Put the request into the store's queue, and see how things stand as of that. One transaction."""
        waiter = Waiter(self._places.waiter(self._new_ticket()), wanted)
        after = self._without_converted(wanted)
        ask = Range(self._places.all, self._places.end)
        put = Put(waiter.key, encode_waiting(wanted), self._session.lease_id)
        while True:
            try:
                if after == self.held:
                    outcome = await self._commit((), (put, ask))
                else:
                    outcome = await self._write(after, (put, ask))
            except BaseException:
                self._strays.add(waiter.key)
                raise
            if isinstance(outcome, Committed):
                break
            await self.settle()
        self.held = after
        waiter.arrival = outcome.revision
        self.waiters.append(waiter)
        try:
            found = outcome.ranges[-1] if outcome.ranges else None
            if found is None:
                await self._read()
            else:
                self._picture.replace(outcome.revision, found.kvs)
        except BaseException:
            self.waiters.remove(waiter)
            self._strays.add(waiter.key)
            raise
        finally:
            self.announce()
        return waiter

    async def _await_grant(self, waiter: Waiter) -> None:
        while True:
            async with self._turn:
                self._check_session()
                await self.settle()
                if await self._try(waiter.lock, waiter, look=False):
                    return
                waiter.ready = trio.Event()
            if self._watcher is None:
                await self._watch_until_ready(waiter)
            else:
                await waiter.ready.wait()

    async def _watch_until_ready(self, waiter: Waiter) -> None:
        self._watcher = waiter
        try:
            with trio.CancelScope() as waiter.watching:
                while True:
                    try:
                        await self._watch()
                    except Compacted:
                        await self._read()
                        self.announce()
                    except (StoreUnavailable, OutcomeUnknown) as exc:
                        log.info("the watch on the locks of inode %d broke: %s", self.ino, exc)
                        await trio.sleep(REWATCH_S)
        finally:
            self._watcher = None
            waiter.watching = None

    async def _watch(self) -> None:
        first = self._picture.revision + 1
        async with self._store.watch(self._places.all, self._places.end, start_revision=first) as batches:
            async for batch in batches:
                self._picture.apply(batch.revision, batch.events)
                self.announce()

    # -- the store ---------------------------------------------------------------------------------------------------

    async def _write(
        self, held: tuple[Lock, ...], writes: Sequence[Op] = (), compares: Sequence[Compare] = ()
    ) -> Committed | Conflict:
        """Make the own key say `held`, and more. A Conflict has been looked at."""
        keep = bool(held) or self._keep_key
        own: tuple[Op, ...] = ()
        if keep:
            record = encode_held(self._session.number, held)
            own = (Put(self._places.held, record, self._session.lease_id),)
        elif self._known:
            own = (Delete(self._places.held),)
        outcome = await self._commit(compares, (*own, *writes))
        if isinstance(outcome, Committed):
            self._known = outcome.revision if keep else 0
            self._stored = held
        return outcome

    async def _commit(self, compares: Sequence[Compare], writes: Sequence[Op]) -> Committed | Conflict:
        own = Compare(self._places.held, Target.MOD, Relation.EQUAL, self._known)
        ask = Range(self._places.all, self._places.end)
        change = Change(Kind.LOCK, ino=self.ino)
        try:
            outcome = await self._session.commit(
                (own, *compares), writes, (change,), time_ns=time.time_ns(), orelse=(ask,)
            )
        except BaseException:
            self._doubtful = True  # it may have been applied, or may be yet (rule 3)
            raise
        self._check_session()
        if isinstance(outcome, Conflict):
            found = outcome.ranges[0]
            assert found is not None
            self._picture.replace(outcome.revision, found.kvs)
            self._see_own(found)
        return outcome

    def _see_own(self, found: RangeResult) -> None:
        """What is in the store of this session's though it should not be: left by transactions that were given up."""
        queued = {waiter.key for waiter in self.waiters}
        known = 0
        for kv in found.kvs:
            if kv.key == self._places.held:
                known = kv.mod_revision
            elif self._places.is_own_waiter(kv.key) and kv.key not in queued:
                self._strays.add(kv.key)
        if known != self._known:
            self._known = known
            self._doubtful = True

    async def _read(self) -> None:
        """How things stand now, as far as the others are concerned. One request."""
        found = await retry(
            lambda: self._store.range(Range(self._places.all, self._places.end)), self._options.operation_deadline_s
        )
        self._picture.replace(found.revision, found.kvs)
        self._check_session()

    def _check_session(self) -> None:
        if self._ended or not self._session.alive:
            raise SessionLost("the session has ended, and its locks with it")
