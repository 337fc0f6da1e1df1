"""Locks of several mounts: one suite for the memory store and for a real etcd."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import InvalidArgument, LockConflict, LockDeadlock, SessionLost
from apollofs.metadata.locks import RANGE_END, Lock
from tests.contract.conftest import Place
from tests.support.lock_mounts import (
    BOUND_S,
    EXCLUSIVE,
    FLOCK,
    INO,
    POSIX,
    SHARED,
    LockMount,
    in_store,
    lock_mounts,
    until_waiting,
)

pytestmark = pytest.mark.contract
_NUMBERS = itertools.count(1)
Mounts = tuple[LockMount, LockMount, LockMount]


@pytest.fixture
async def mounts(place: Place) -> AsyncIterator[Mounts]:
    with trio.fail_after(BOUND_S):
        async with lock_mounts(place.store, f"locks-{next(_NUMBERS)}", 3) as (one, two, three):
            yield one, two, three


async def waiting(mount: LockMount, count: int, ino: int = INO) -> None:
    await until_waiting(mount.store, mount.keys, count, ino)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.testing.wait_all_tasks_blocked(0.001)


async def refused(mount: LockMount, owner: int, *args: object, **kwargs: object) -> bool:
    try:
        await mount.acquire(owner, *args, wait=False, **kwargs)  # type: ignore[arg-type]  # passed on as they are
    except LockConflict:
        return True
    return False


# -- what excludes what -----------------------------------------------------------------------------------------------


async def test_exclusive_excludes_over_mounts_and_owners(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1)
    assert await refused(two, 1)  # owner numbers of two mounts have nothing to do with each other
    assert await refused(one, 2, SHARED)
    await one.release(1)
    assert not await refused(two, 1)
    assert await refused(one, 1)


async def test_shared_locks_stand_together(mounts: Mounts) -> None:
    one, two, three = mounts
    for mount in mounts:
        await mount.acquire(1, SHARED)
    assert await refused(one, 1, EXCLUSIVE)
    await two.release(1)
    await three.release(1)
    assert not await refused(one, 1, EXCLUSIVE)


async def test_ranges_and_kinds_are_apart(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, EXCLUSIVE, 0, 9)
    await two.acquire(1, EXCLUSIVE, 10, 19)
    await two.acquire(2, EXCLUSIVE, kind=FLOCK)
    await two.acquire(1, EXCLUSIVE, ino=INO + 1)
    assert await refused(two, 1, EXCLUSIVE, 9, 12)
    await one.release(1, 5, 9)
    assert not await refused(two, 1, EXCLUSIVE, 9, 12)
    held, _, _ = await in_store(one.store, one.keys)
    assert {(lock.start, lock.end) for lock in held} == {(0, 4), (9, 19)}


async def test_the_first_lock_in_the_way_is_told(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, SHARED, 10, 19)
    await two.acquire(7, SHARED, 5, 14)
    assert await one.locks.test(INO, POSIX, 9, 0, RANGE_END, SHARED) is None
    first = Lock(two.session.number, 7, 5, 14, SHARED, 7)
    assert await one.locks.test(INO, POSIX, 9, 0, RANGE_END, EXCLUSIVE) == first
    assert await two.locks.test(INO, POSIX, 7, 0, 9, EXCLUSIVE) is None
    assert await one.locks.test(INO, FLOCK, 9, 0, RANGE_END, EXCLUSIVE) is None


async def test_a_failed_flock_conversion_loses_the_lock(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, SHARED, kind=FLOCK)
    await two.acquire(1, SHARED, kind=FLOCK)
    assert await refused(one, 1, EXCLUSIVE, kind=FLOCK)
    assert not one.locks.holds(INO, FLOCK, 1)
    assert not await refused(two, 1, EXCLUSIVE, kind=FLOCK)


async def test_a_failed_fcntl_upgrade_keeps_the_lock(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, SHARED)
    await two.acquire(1, SHARED)
    assert await refused(one, 1, EXCLUSIVE)
    assert one.locks.holds(INO, POSIX, 1)
    assert await refused(two, 1, EXCLUSIVE)


async def test_nonsense_is_refused(mounts: Mounts) -> None:
    one, _, _ = mounts
    for start, end in ((5, 4), (-1, 4), (0, RANGE_END + 1)):
        with pytest.raises(InvalidArgument):
            await one.acquire(1, EXCLUSIVE, start, end)


# -- waiting ----------------------------------------------------------------------------------------------------------


async def test_waiters_are_served_in_order_of_arrival(mounts: Mounts) -> None:
    order: list[int] = []

    async def take(mount: LockMount, number: int) -> None:
        await mount.acquire(number)
        order.append(number)
        await trio.testing.wait_all_tasks_blocked()
        await mount.release(number)

    one = mounts[0]
    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        for number in range(9):
            nursery.start_soon(take, mounts[number % 3], number)
            await waiting(one, number + 1)
        await one.release(99)
    assert order == list(range(9))
    assert (await in_store(one.store, one.keys))[2] == 0


async def test_readers_do_not_starve_a_writer_and_wake_together(mounts: Mounts) -> None:
    one, two, three = mounts
    order: list[str] = []

    async def take(mount: LockMount, owner: int, name: str) -> None:
        await mount.acquire(owner, EXCLUSIVE if name == "writer" else SHARED)
        order.append(name)

    await one.acquire(1, SHARED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, two, 1, "writer")
        await waiting(one, 1)
        assert await refused(three, 9, SHARED)
        nursery.start_soon(take, three, 1, "reader")
        await waiting(one, 2)
        nursery.start_soon(take, one, 2, "reader")
        await waiting(one, 3)
        await one.release(1)
        await until(lambda: order == ["writer"])
        await two.release(1)
    assert order == ["writer", "reader", "reader"]


async def test_who_is_waited_for_may_go_on(mounts: Mounts) -> None:
    one, two, three = mounts
    second_has_it = trio.Event()

    async def second() -> None:
        await two.acquire(1, EXCLUSIVE, 5, 15)
        second_has_it.set()

    await one.acquire(1, EXCLUSIVE, 0, 9)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second)
        await waiting(one, 1)
        nursery.start_soon(three.acquire, 1, EXCLUSIVE, 12, 20)
        await waiting(one, 2)
        await one.acquire(1, EXCLUSIVE, 10, 25, wait=False)
        await one.release(1)
        await second_has_it.wait()
        await two.release(1)
    assert three.locks.holds(INO, POSIX, 1)


async def test_an_interrupted_waiter_leaves_nothing_and_lets_others_pass(mounts: Mounts) -> None:
    one, two, three = mounts
    await one.acquire(1, SHARED)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when_waiting, one, scope)
            await two.acquire(1, EXCLUSIVE)
        assert scope.cancelled_caught
        assert not two.locks.holds(INO, POSIX, 1)
        assert not await refused(three, 1, SHARED)
    held, queue, _ = await in_store(one.store, one.keys)
    assert ({lock.session for lock in held}, queue) == ({one.session.number, three.session.number}, [])


async def cancel_when_waiting(mount: LockMount, scope: trio.CancelScope) -> None:
    await waiting(mount, 1)
    scope.cancel()


async def test_a_dead_mount_frees_its_locks_and_its_place(mounts: Mounts) -> None:
    one, two, three = mounts
    await one.acquire(1)

    async def wait_in_vain() -> None:
        with pytest.raises(SessionLost):
            await two.acquire(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_in_vain)
        await waiting(three, 1)
        nursery.start_soon(three.acquire, 1)
        await waiting(three, 2)
        await two.lose_session()
        await waiting(three, 1)
        await one.lose_session()
    assert three.locks.holds(INO, POSIX, 1)
    assert not one.locks.holds(INO, POSIX, 1)
    await one.release(1)
    with pytest.raises(SessionLost):
        await one.acquire(1)


async def test_a_mount_whose_lease_has_ended_gets_no_lock(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1)
    await two.store.lease_revoke(one.session.lease_id)
    with pytest.raises(SessionLost):
        await one.acquire(1, ino=INO + 1)
    await two.acquire(1, wait=False)


async def test_the_next_session_starts_without_locks(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1)
    await one.lose_session()
    one.locks.begin(two.session)
    assert not one.locks.holds(INO, POSIX, 1)
    await one.acquire(5, wait=False)


# -- deadlock ---------------------------------------------------------------------------------------------------------


async def test_a_circle_over_inodes_on_one_mount(mounts: Mounts) -> None:
    one, _, _ = mounts
    for owner in (1, 2, 3):
        await one.acquire(owner, ino=owner)
    async with trio.open_nursery() as nursery:
        for owner, wanted in ((1, 2), (2, 3)):
            nursery.start_soon(partial(one.acquire, owner, ino=wanted))
            await until(partial(one.sleeps, wanted))
        with pytest.raises(LockDeadlock):
            await one.acquire(3, ino=1)
        assert (await in_store(one.store, one.keys, 1))[1] == []
        await one.release(3, ino=3)
        await waiting(one, 0, 3)
        await one.release(2, ino=2)


async def test_two_mounts_upgrade_at_once(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, SHARED)
    await two.acquire(1, SHARED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.acquire, 1, EXCLUSIVE)
        await until(one.sleeps)
        with pytest.raises(LockDeadlock):
            await two.acquire(1, EXCLUSIVE)
        assert two.locks.holds(INO, POSIX, 1)
        await two.release(1)
    assert [lock.type for lock in (await in_store(one.store, one.keys))[0]] == [EXCLUSIVE]


async def test_flock_upgrades_never_deadlock(mounts: Mounts) -> None:
    one, two, _ = mounts
    await one.acquire(1, SHARED, kind=FLOCK)
    await two.acquire(1, SHARED, kind=FLOCK)

    async def upgrade(mount: LockMount) -> None:
        await mount.acquire(1, EXCLUSIVE, kind=FLOCK)
        await mount.release(1, kind=FLOCK)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upgrade, one)
        nursery.start_soon(upgrade, two)
    assert (await in_store(one.store, one.keys, kind=FLOCK))[2] == 0
