"""Locks when calls are interrupted, replies are lost, or the store does not answer: nothing stays behind."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import (
    DeadlineExceeded,
    LockConflict,
    OutcomeUnknown,
    SessionLost,
    StoreError,
    StoreUnavailable,
)
from apollofs.metadata.locks import LockKind
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Put, Relation
from tests.support.lock_mounts import (
    BOUND_S,
    EXCLUSIVE,
    FLOCK,
    INO,
    POSIX,
    SHARED,
    LockMount,
    in_store,
    lock_mount,
    make_lock_volume,
    until_waiting,
)

VOLUME = "locks"
IMPATIENT = SessionOptions(lease_ttl_s=600, operation_deadline_s=0, slots=4)


class Faults:
    """A hook that fails requests of the given method as long as it is told to."""

    def __init__(self) -> None:
        self.plan: list[tuple[Moment, type[StoreError]] | None] = []
        self.always: tuple[Moment, type[StoreError]] | None = None
        self.seen = 0
        self.on_txn: Callable[[Moment], None] | None = None

    async def __call__(self, moment: Moment, request: Request) -> None:
        if request.method != "txn":
            return
        if self.on_txn is not None:
            self.on_txn(moment)
        if moment is Moment.BEFORE:
            self.seen += 1
            self._now = self.plan.pop(0) if self.plan else self.always
        if self._now is not None and self._now[0] is moment:
            raise self._now[1]("injected")


class Pair:
    """A mount with a faulty path to the store, and one with a good one."""

    def __init__(self, store: MemoryStore, faults: Faults, faulty: LockMount, good: LockMount) -> None:
        self.store = store
        self.faults = faults
        self.faulty = faulty
        self.good = good

    async def assert_left(self, held: int, waiting: int = 0) -> None:
        """So many locks and requests of the faulty mount are in the store."""
        in_held, in_queue, _ = await in_store(self.store, self.good.keys)
        number = self.faulty.session.number
        assert sum(lock.session == number for lock in in_held) == held
        assert sum(lock.session == number for lock in in_queue) == waiting


async def make_pair(options: SessionOptions) -> Pair:
    store = MemoryStore()
    await make_lock_volume(store, VOLUME)
    faults = Faults()
    faulty = await lock_mount(store.another(faults), VOLUME, options)
    faults.seen = 0
    return Pair(store, faults, faulty, await lock_mount(store, VOLUME))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with trio.fail_after(BOUND_S):
        pair = await make_pair(SessionOptions(lease_ttl_s=600, operation_deadline_s=10, slots=4))
        yield pair
        await pair.faulty.lose_session()
        await pair.good.lose_session()


@pytest.fixture
async def impatient() -> AsyncIterator[Pair]:
    """Its faulty mount gives up at the first failure."""
    with trio.fail_after(BOUND_S):
        yield await make_pair(IMPATIENT)


LOST_REPLY = (Moment.AFTER, OutcomeUnknown)
LOST_REQUEST = (Moment.BEFORE, OutcomeUnknown)
REFUSED = (Moment.BEFORE, StoreUnavailable)


# -- lost replies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [LOST_REPLY, LOST_REQUEST, REFUSED])
async def test_a_lost_message_changes_nothing(pair: Pair, fault: tuple[Moment, type[StoreError]]) -> None:
    pair.faults.plan = [fault]
    await pair.faulty.acquire(1)
    await pair.assert_left(1)
    pair.faults.plan = [fault]
    await pair.faulty.release(1)
    await pair.assert_left(0)
    await pair.good.acquire(1, wait=False)


@pytest.mark.parametrize("fault", [LOST_REPLY, LOST_REQUEST, REFUSED])
async def test_a_lost_message_while_queueing(pair: Pair, fault: tuple[Moment, type[StoreError]]) -> None:
    await pair.good.acquire(1)
    async with trio.open_nursery() as nursery:
        pair.faults.plan = [None, fault]  # the look passes, the request for a place does not
        nursery.start_soon(pair.faulty.acquire, 1)
        await until_waiting(pair.store, pair.good.keys, 1)
        pair.faults.plan = [fault]
        await pair.good.release(1)
    await pair.assert_left(1)


@pytest.mark.parametrize("fault", [LOST_REPLY, LOST_REQUEST, REFUSED])
async def test_giving_up_leaves_nothing(impatient: Pair, fault: tuple[Moment, type[StoreError]]) -> None:
    impatient.faults.plan = [fault]
    with pytest.raises(DeadlineExceeded):
        await impatient.faulty.acquire(1)
    assert not impatient.faulty.locks.holds(INO, POSIX, 1)
    await impatient.assert_left(0)
    await impatient.good.acquire(1, wait=False)


@pytest.mark.parametrize("fault", [LOST_REPLY, LOST_REQUEST, REFUSED])
async def test_a_release_that_could_not_be_told_is_told_later(
    impatient: Pair, fault: tuple[Moment, type[StoreError]]
) -> None:
    await impatient.faulty.acquire(1)
    await impatient.faulty.acquire(2, EXCLUSIVE, ino=INO + 1)
    impatient.faults.always = fault
    with pytest.raises(DeadlineExceeded):
        await impatient.faulty.release(1)
    assert not impatient.faulty.locks.holds(INO, POSIX, 1)
    impatient.faults.always = None
    await impatient.faulty.locks.mend()
    await impatient.assert_left(0)
    await impatient.good.acquire(1, wait=False)
    assert impatient.faulty.in_use == {(INO + 1, POSIX)}


async def test_an_acquisition_that_arrives_late_is_void(pair: Pair) -> None:
    """A copy of a transaction that was given up reaches the store after the lock has been given back."""
    late: list[Request] = []

    async def swallow(moment: Moment, request: Request) -> None:
        if request.method == "txn" and moment is Moment.BEFORE and not late:
            late.append(request)
            raise OutcomeUnknown("injected")

    mount = await lock_mount(store := pair.store.another(), VOLUME, IMPATIENT)
    store.hook = swallow
    with pytest.raises(DeadlineExceeded):
        await mount.acquire(1)
    compares, then, orelse = late[0].arguments
    assert any(isinstance(op, Put) and op.key == mount.keys.locks(INO, POSIX, mount.session.number) for op in then)  # type: ignore[attr-defined]  # a hook sees objects
    result = await pair.store.txn(compares, then, orelse)  # type: ignore[arg-type]  # likewise
    assert not result.succeeded
    await pair.good.acquire(1, wait=False)
    await pair.good.release(1)
    await mount.acquire(1, wait=False)
    await mount.release(1)
    assert (await in_store(pair.store, mount.keys))[0] == []


# -- interruption -----------------------------------------------------------------------------------------------------


async def interrupted(call: Callable[[], Awaitable[None]], passes: int) -> bool:
    """Run it and cancel it after so many passes of the scheduler. Whether it came to its end."""
    ended = False

    async def run() -> None:
        nonlocal ended
        await call()
        ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    return ended


@pytest.mark.parametrize("plan", [[], [LOST_REPLY], [LOST_REQUEST], [LOST_REPLY, LOST_REPLY], [None, LOST_REPLY]])
@pytest.mark.parametrize("kind", [POSIX, FLOCK])
async def test_interrupted_at_every_point_while_free(
    pair: Pair, plan: list[tuple[Moment, type[StoreError]] | None], kind: LockKind
) -> None:
    rng = random.Random(7)
    for passes in range(12):
        pair.faults.plan = list(plan)
        ino = INO + passes
        ended = await interrupted(partial(pair.faulty.acquire, 1, ino=ino, kind=kind), passes)
        pair.faults.plan = []
        held, queue, _ = await in_store(pair.store, pair.good.keys, ino, kind)
        assert (len(held), queue) == (int(ended), [])
        assert pair.faulty.locks.holds(ino, kind, 1) == ended
        await pair.faulty.release(1, ino=ino, kind=kind)
        await pair.good.acquire(rng.randrange(9), ino=ino, kind=kind, wait=False)


@pytest.mark.parametrize("plan", [[], [None, LOST_REPLY], [None, LOST_REQUEST], [None, None, LOST_REPLY]])
async def test_interrupted_at_every_point_while_waiting(
    pair: Pair, plan: list[tuple[Moment, type[StoreError]] | None]
) -> None:
    """The lock comes free about when the waiter is interrupted; a second waiter behind it always gets it."""
    for passes in range(0, 60, 2):
        pair.faults.plan = list(plan)
        await pair.good.acquire(1)
        outcome: list[bool] = []

        async def first(passes: int = passes, outcome: list[bool] = outcome) -> None:
            outcome.append(await interrupted(lambda: pair.faulty.acquire(1), passes))
            if outcome[0]:
                await pair.faulty.release(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            for _ in range(passes // 2):
                await trio.lowlevel.checkpoint()
            nursery.start_soon(pair.good.acquire, 2)
            await trio.lowlevel.checkpoint()
            await pair.good.release(1)
        await pair.good.release(2)
        pair.faults.plan = []
        held, queue, _ = await in_store(pair.store, pair.good.keys)
        assert (held, queue) == ([], []), passes
        assert not pair.faulty.locks.holds(INO, POSIX, 1)
        assert pair.faulty.in_use == set()


async def test_interrupted_release_still_releases(pair: Pair) -> None:
    for passes in range(10):
        await pair.faulty.acquire(1, SHARED)
        pair.faults.plan = [LOST_REPLY, LOST_REQUEST] if passes % 2 else []
        await interrupted(lambda: pair.faulty.release(1), passes + 1)
        pair.faults.plan = []
        assert not pair.faulty.locks.holds(INO, POSIX, 1)
        await pair.assert_left(0)


async def test_who_is_passed_over_only_because_of_another_that_leaves(pair: Pair) -> None:
    """One mount's request passes two others over; before it arrives the first has left, and the second has its lock."""
    sent, may_arrive = trio.Event(), trio.Event()

    async def hold_back(moment: Moment, request: Request) -> None:
        if request.method == "txn" and moment is Moment.BEFORE:
            compares = request.arguments[0]
            if any(compare.relation is Relation.GREATER for compare in compares):  # type: ignore[attr-defined]  # a hook sees objects
                sent.set()
                await may_arrive.wait()

    handle = pair.store.another()
    one, two, three = await lock_mount(handle, VOLUME), pair.faulty, pair.good
    has_it = trio.Event()

    async def behind() -> None:
        await three.acquire(3, EXCLUSIVE, 1, 2)
        has_it.set()

    async def pass_over() -> None:
        with pytest.raises(LockConflict):
            await one.acquire(1, EXCLUSIVE, 2, 2, wait=False)

    async def leave_when_told(leaving: trio.CancelScope) -> None:
        with leaving:
            await two.acquire(2, EXCLUSIVE, 0, 1)

    await one.acquire(1, EXCLUSIVE, 0, 0)
    async with trio.open_nursery() as nursery:
        leaving = trio.CancelScope()
        nursery.start_soon(leave_when_told, leaving)
        await until_waiting(pair.store, one.keys, 1)
        nursery.start_soon(behind)
        await until_waiting(pair.store, one.keys, 2)
        handle.hook = hold_back
        nursery.start_soon(pass_over)
        await sent.wait()
        leaving.cancel()
        await has_it.wait()
        may_arrive.set()
    await one.lose_session()


# -- the watch --------------------------------------------------------------------------------------------------------


async def test_compaction_under_a_waiter(pair: Pair) -> None:
    """The lock comes free, and that is no longer told, before the waiter's watch begins."""
    watches = 0

    async def compact_first(moment: Moment, request: Request) -> None:
        nonlocal watches
        if request.method == "watch" and moment is Moment.BEFORE:
            watches += 1
            if watches == 1:
                await pair.good.release(1)
                await pair.store.compact((await pair.store.txn((), (Put(b"mark", b""),))).revision)

    handle = pair.store.another()
    mount = await lock_mount(handle, VOLUME)
    handle.hook = compact_first
    await pair.good.acquire(1)
    await mount.acquire(1)
    assert watches == 1
    held, queue, _ = await in_store(pair.store, pair.good.keys)
    assert ([lock.session for lock in held], queue) == ([mount.session.number], [])


async def test_a_watch_that_breaks_is_opened_again(pair: Pair) -> None:
    broken = 0

    async def break_watch(moment: Moment, request: Request) -> None:
        nonlocal broken
        if request.method == "watch" and broken < 2:
            broken += 1
            raise StoreUnavailable("injected")

    handle = pair.store.another()
    mount = await lock_mount(handle, VOLUME)
    handle.hook = break_watch
    await pair.good.acquire(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.acquire, 1)
        await until_waiting(pair.store, pair.good.keys, 1)
        await pair.good.release(1)
    assert broken == 2


# -- the session's end ------------------------------------------------------------------------------------------------


async def test_a_lease_that_runs_out_frees_locks() -> None:
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])
    await make_lock_volume(store, VOLUME)
    with trio.fail_after(BOUND_S):
        short = await lock_mount(store, VOLUME, SessionOptions(lease_ttl_s=5))
        other = await lock_mount(store, VOLUME)
        await short.acquire(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.acquire, 1)
            await until_waiting(store, other.keys, 1)
            now[0] = 6
            store.expire_leases()
        with pytest.raises(SessionLost):
            await short.acquire(2, ino=INO + 1)


async def test_session_loss_at_every_point(pair: Pair) -> None:
    """Everybody who acquires, waits or releases comes back, with SessionLost or before it."""
    for passes in range(25):
        mount = await lock_mount(pair.store, VOLUME)
        await pair.good.acquire(1, SHARED)
        outcomes: list[str] = []

        async def call(action: Callable[[], Awaitable[None]], outcomes: list[str] = outcomes) -> None:
            try:
                await action()
            except SessionLost:
                outcomes.append("lost")
            else:
                outcomes.append("done")

        await mount.acquire(1, EXCLUSIVE, ino=INO + 1)
        async with trio.open_nursery() as nursery:
            for owner in (1, 2, 3):
                nursery.start_soon(call, partial(mount.acquire, owner))
            nursery.start_soon(call, partial(mount.release, 1, ino=INO + 1))
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            await mount.lose_session()
        assert len(outcomes) == 4
        assert not mount.locks.holds(INO, POSIX, 1)
        assert mount.in_use == set()
        await pair.good.acquire(1, EXCLUSIVE, wait=False)
        await pair.good.release(1)
