"""A session: one mount's life in the store, bound to a lease, and the journal slots that fence its transactions.

Rules
1. Every transaction of a session compares one of its slots' mod_revision with what the session knows of it, and puts
   its journal record there. A slot carries one transaction at a time.
2. If the lease has ended the slot is gone, the compare fails, and nothing was changed: `SessionLost` (fencing).
3. A transaction whose outcome isn't known is sent again, as it is. Either copy may be applied, never both: the first
   one changes the slot. If the compare then fails and the slot holds this transaction's sequence number, it had been
   applied (exactly once).
4. A slot that was given up while in doubt (deadline, interrupt) is settled before its next use: a record of kind
   NOTHING is put under the same compare. Whichever arrives first wins, so a copy that is still on its way dies.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import trio

from apollofs.metadata import journal
from apollofs.metadata.errors import (
    DeadlineExceeded,
    LeaseNotFound,
    OutcomeUnknown,
    SessionLost,
    StoreError,
    StoreUnavailable,
)
from apollofs.metadata.fates import Fates
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.patience import Patience
from apollofs.metadata.records import MountRecord
from apollofs.metadata.store import (
    Compare,
    KeyValue,
    Op,
    Put,
    Range,
    RangeResult,
    Relation,
    Store,
    Target,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
CLOCK_RATE_MARGIN = 0.95
"""How much of a lease is trusted here, for a clock that runs slower than etcd's."""
BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class SessionOptions:
    lease_ttl_s: int = 15
    operation_deadline_s: float = 30.0
    slots: int = 32
    delegations: bool = True
    """Whether to cache directory groups under delegations; without, every read asks the store."""
    write_back: bool = True
    """Whether to answer before the store does where nobody else can tell the difference (`ahead.py`)."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The transaction was applied at `revision`. `ranges` are its reads, or None if its reply was lost."""

    revision: int
    ranges: tuple[RangeResult | None, ...] | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """A precondition did not hold. `ranges` are the reads of the other branch, as of `revision`."""

    revision: int
    ranges: tuple[RangeResult | None, ...]


@dataclass(slots=True)
class Slot:
    """A journal slot, and what the session knows of it."""

    key: bytes
    mod_revision: int
    doubtful: bool = False
    doubted: SlotRecord | None = None
    """What was sent last: while `doubtful`, nobody knows whether it was applied."""


class Session:
    """Made by `session_opening.open_session`. All methods raise SessionLost once the lease is known to have ended."""

    def __init__(self, store: Store, keys: Keys, options: SessionOptions, record: MountRecord, site_id: int) -> None:
        self._store = store
        self._keys = keys
        self._options = options
        self.record = record
        self.number = record.session
        self.site_id = site_id
        self.lease_id = 0
        self._slots: list[Slot] = []
        self._free = trio.Semaphore(0, max_value=options.slots)
        self._settling = 0
        """Slots that are being settled: until that has ended they are in doubt as they were."""
        self._sequence = 0
        self._inos = 0
        self._blobs = 0
        self._renewed_for_s = options.lease_ttl_s * CLOCK_RATE_MARGIN
        self._valid_until = 0.0
        self.proven_hook: Callable[[float], None] = lambda _: None
        """Called with the time (`boot_time`) until which the lease is proven, whenever that has moved."""
        self._patience = Patience()
        """With which transactions that have a deadline wait for the store."""
        self.fates = Fates()
        self.given_up = False
        self.lost = trio.Event()
        """Set once, when the lease is known to have ended."""
        self._bound: set[trio.CancelScope] = set()

    def begin(self, slots: list[Slot], lease_asked: float) -> None:
        """Take the slots that `open_session` made; the lease was asked for at `lease_asked` (`boot_time`)."""
        self._valid_until = lease_asked + self._renewed_for_s
        self._slots = slots
        for _ in slots:
            self._free.release()

    # -- numbers -----------------------------------------------------------------------------------------------------

    def new_ino(self) -> int:
        """A number that was never used and never will be. No request."""
        self._inos += 1
        assert self._inos < 1 << 32
        return self.number << 32 | self._inos

    def new_blob(self) -> int:
        """Likewise for a blob; the top byte says which site's store holds it."""
        self._blobs += 1
        assert self._blobs < 1 << 32
        return self.site_id << 56 | self.number << 32 | self._blobs

    @property
    def alive(self) -> bool:
        return not self.lost.is_set()

    @property
    def in_doubt(self) -> bool:
        """Whether a transaction that was given up may still be applied."""
        return self._settling > 0 or any(slot.doubtful for slot in self._slots)

    @property
    def proven(self) -> bool:
        """Whether the lease can't have ended yet: what is cached under it may be used."""
        return boot_time() < self._valid_until and not self.lost.is_set()

    @property
    def proven_until(self) -> float:
        """Until when (`boot_time`) it can't, if it is not lost."""
        return self._valid_until

    @property
    def proven_s(self) -> float:
        """For how many seconds from now it can't; counted from before the keepalive was sent."""
        return max(0.0, self._valid_until - boot_time()) if self.alive else 0.0

    def hand_over(self, patience: Patience) -> None:
        """This is a mount's next session, which takes over its patience."""
        self._patience = patience
        self._patience.prove(self.proven_s)

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """A block that ends with SessionLost as soon as the lease is known to have ended. It waits for others, who know
        of us by keys that go with the lease; nothing of it may be in doubt."""
        self._check_alive(in_doubt=False)
        with trio.CancelScope() as scope:
            self._bound.add(scope)
            try:
                yield
            finally:
                self._bound.discard(scope)
        if scope.cancelled_caught:
            raise self._ended(in_doubt=False)

    # -- transactions ------------------------------------------------------------------------------------------------

    async def commit(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Op],
        changes: tuple[Change, ...],
        *,
        time_ns: int,
        orelse: Sequence[Op] = (),
        deadline_s: float | None = None,
    ) -> Committed | Conflict:
        """Apply `writes` (puts, deletes, and reads whose results are wanted) if all `compares` hold; exactly once.

        One transaction, more only while replies are lost, for `deadline_s` (None: that of an operation), and no longer
        than `patience.py` has it unless that is inf. Raises SessionLost (nothing was changed), DeadlineExceeded (the
        message says whether it may have been applied), StoreError. Cancellation is taken between attempts only.
        With inf, any other error but SessionLost means that it was not applied and never will be; a Conflict ends the
        session, as an earlier copy may still be under way.
        """
        await self._free.acquire()
        slot = self._slots.pop()
        try:
            if slot.doubtful:
                await self._settle(slot)
            self._sequence += 1
            record = SlotRecord(self._sequence, self.site_id, time_ns, changes)
            deadline = trio.current_time() + (self._options.operation_deadline_s if deadline_s is None else deadline_s)
            return await self._transact(slot, record, compares, writes, orelse, deadline)
        finally:
            self._put_back(slot)

    def _put_back(self, slot: Slot) -> None:
        """Settled slots are taken first, so that a doubtful one disturbs nobody while others are free."""
        if slot.doubtful:
            self._slots.insert(0, slot)
        else:
            self._slots.append(slot)
        self._free.release()

    async def _settle(self, slot: Slot) -> int:
        """Take a slot out of doubt; the sequence number of what is in it now."""
        self._sequence += 1
        record = SlotRecord(self._sequence, self.site_id, 0, (Change(Kind.NOTHING),))
        compare = Compare(slot.key, Target.MOD, Relation.EQUAL, slot.mod_revision)
        put = Put(slot.key, journal.encode(record), self.lease_id)
        self._settling += 1
        try:
            with self._patience.bounded():
                result = await retry(
                    lambda: self._store.txn((compare,), (put,), (Range(slot.key),)), self._options.operation_deadline_s
                )
        finally:
            self._settling -= 1
        doubted, slot.doubted, slot.doubtful = slot.doubted, None, False
        written = record.sequence
        if result.succeeded:
            slot.mod_revision = result.revision
        else:
            held = self._slot_value(slot, result.ranges[0])
            slot.mod_revision = held.mod_revision
            written = journal.decode(held.value).sequence
        if doubted is not None:
            self.fates.tell(doubted, applied=written == doubted.sequence)
        return written

    async def settle(self) -> None:
        """Take slots out of doubt that nobody uses now, so that the session as a whole gets out of it. Best effort."""
        try:
            while self.alive and any(slot.doubtful for slot in self._slots):
                self._free.acquire_nowait()
                slot = self._slots.pop(0)  # doubtful ones stand first
                try:
                    await self._settle(slot)
                finally:
                    self._put_back(slot)
        except trio.WouldBlock:
            log.debug("all slots are in use; those in doubt are settled later")
        except (StoreError, DeadlineExceeded) as exc:
            log.info("a slot stays in doubt: %s", exc)
        except SessionLost:
            log.debug("the session has ended before a slot could be settled")

    async def _transact(
        self,
        slot: Slot,
        record: SlotRecord,
        compares: Sequence[Compare],
        writes: Sequence[Op],
        orelse: Sequence[Op],
        deadline: float,
    ) -> Committed | Conflict:
        fence = Compare(slot.key, Target.MOD, Relation.EQUAL, slot.mod_revision)
        then = (Put(slot.key, journal.encode(record), self.lease_id), *writes)
        slot.doubted = record
        self.fates.sent(record)
        otherwise = (Range(slot.key), *orelse)
        backoff_s = BACKOFF_FIRST_S
        patience = self._patience if deadline < math.inf else Patience()
        began = trio.current_time()
        while True:
            self._check_alive(in_doubt=slot.doubtful)
            try:
                with patience.scope(began, shield=True) as scope:
                    result = await self._store.txn((fence, *compares), then, otherwise)
                if not scope.cancelled_caught:
                    break
                raise OutcomeUnknown("no answer before the lease had ended")
            except LeaseNotFound as exc:
                self._lose()
                raise self._ended(in_doubt=slot.doubtful) from exc
            except StoreError as exc:
                slot.doubtful = slot.doubtful or isinstance(exc, OutcomeUnknown)
                in_this_slot = slot.doubtful and deadline == math.inf
                if not (in_this_slot or isinstance(exc, (OutcomeUnknown, StoreUnavailable))):
                    self._not_sent(slot, record)
                    raise
                if trio.current_time() > deadline or patience.gives_up(began):
                    self._not_sent(slot, record)
                    fate = "may have been applied" if slot.doubtful else "was not applied"
                    raise DeadlineExceeded(f"metadata store: {exc} (the operation {fate})") from exc
            await trio.sleep(backoff_s * (0.5 + random.random()))
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
        outcome = self._outcome(slot, record, result.succeeded, result.revision, result.ranges)
        if isinstance(outcome, Conflict) and slot.doubtful and deadline < math.inf:
            return await self._refused(slot, record, outcome)
        self.fates.tell(record, applied=isinstance(outcome, Committed))
        return outcome

    def _not_sent(self, slot: Slot, record: SlotRecord) -> None:
        if not slot.doubtful:
            self.fates.tell(record, applied=False)

    def _outcome(
        self,
        slot: Slot,
        record: SlotRecord,
        succeeded: bool,
        revision: int,
        ranges: tuple[RangeResult | None, ...],
    ) -> Committed | Conflict:
        if succeeded:
            slot.mod_revision, slot.doubtful = revision, False
            return Committed(revision, ranges[1:])
        held = self._slot_value(slot, ranges[0])
        if held.mod_revision == slot.mod_revision:
            return Conflict(revision, ranges[1:])
        assert slot.doubtful, "a slot of ours was written by somebody else"
        assert journal.decode(held.value).sequence == record.sequence, "a settled slot was written by an old request"
        slot.mod_revision, slot.doubtful = held.mod_revision, False
        return Committed(held.mod_revision, None)

    async def _refused(self, slot: Slot, record: SlotRecord, conflict: Conflict) -> Committed | Conflict:
        """A copy of a transaction was refused while another one may still be on its way: what it found in the way may
        be gone when that one arrives. So the slot is settled before anybody is told."""
        written = await self._settle(slot)
        if written == record.sequence:
            return Committed(slot.mod_revision, None)
        return conflict

    def _slot_value(self, slot: Slot, found: RangeResult | None) -> KeyValue:
        assert found is not None
        if not found.kvs:
            self._lose()
            raise self._ended(in_doubt=slot.doubtful)
        return found.kvs[0]

    # -- life --------------------------------------------------------------------------------------------------------

    async def keep_alive(self) -> None:
        """Renew the lease until it is lost or this is cancelled. A mount that can't renew in time has lost it.

        Slots in doubt are settled beside it: that may have to wait where renewing does not."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._settle_always)
            await self._renew()
            nursery.cancel_scope.cancel()

    async def _settle_always(self) -> None:
        while True:
            await trio.sleep(self._options.lease_ttl_s / 3)
            await self.settle()

    async def _renew(self) -> None:
        ttl_s = self._options.lease_ttl_s
        pause_s = ttl_s / 3
        while self.alive:
            with trio.move_on_after(pause_s):
                await self.lost.wait()
                break
            sent = boot_time()
            pause_s = ttl_s / 3
            try:
                left_s = await self._store.lease_keepalive(self.lease_id)
            except StoreError:
                pause_s = ttl_s / 15  # so that a short interruption ends here as soon as there
                # fencing does not depend on this: a transaction after the lease's end changes nothing
                if boot_time() > self._valid_until + ttl_s:
                    self._lose()
                continue
            if left_s <= 0:
                self._lose()
                break
            self._valid_until = sent + self._renewed_for_s
            self.proven_hook(self._valid_until)
            self._patience.prove(self.proven_s)

    def give_up(self) -> None:
        """End the session now: what was known under it can't be relied on any more. Its lease is for `close` to give
        back: until then others wait for what it holds."""
        self.given_up = True
        self._lose()

    async def close(self) -> None:
        """Give the lease back: slots, locks and the mount's record go at once. Best effort, bounded."""
        with trio.move_on_after(5, shield=True), contextlib.suppress(StoreError):
            await self._store.lease_revoke(self.lease_id)
        self._lose()

    def _check_alive(self, *, in_doubt: bool) -> None:
        if not self.alive:
            raise self._ended(in_doubt=in_doubt)

    def _ended(self, *, in_doubt: bool) -> SessionLost:
        outcome = "the operation may have been applied before" if in_doubt else "nothing was changed"
        return SessionLost(f"the session's lease has ended; {outcome}", in_doubt=in_doubt)

    def _lose(self) -> None:
        self.lost.set()
        for scope in self._bound:
            scope.cancel()


def boot_time() -> float:
    """Seconds since boot, counting while the machine sleeps, as a lease does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def retry(call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
    """Repeat an idempotent call on OutcomeUnknown and StoreUnavailable; DeadlineExceeded after `deadline_s`.

    The deadline ends a call that is under way, too: it may have been applied then. 0: one call, however long it takes.
    """
    backoff_s = BACKOFF_FIRST_S
    failure: Exception | None = None
    with trio.move_on_after(deadline_s or math.inf):
        while True:
            try:
                return await call()
            except (OutcomeUnknown, StoreUnavailable) as exc:
                failure = exc
            if not deadline_s:
                break
            await trio.sleep(backoff_s * (0.5 + random.random()))
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
    raise DeadlineExceeded(f"metadata store: {failure or f'no answer within {deadline_s:g} s'}") from failure
