"""A mount that decides alone about the locks of an inode: what it saves, and how others get their turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from apollofs.metadata import lock_recall, pauses
from apollofs.metadata import locks as locks_module
from apollofs.metadata.errors import DeadlineExceeded, LockConflict, OutcomeUnknown, SessionLost
from apollofs.metadata.memory import Hook, MemoryStore, Moment, Request
from apollofs.metadata.session import SessionOptions
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
PLACE = (INO, POSIX)
PATIENT = SessionOptions(lease_ttl_s=600, operation_deadline_s=10, slots=8)


@dataclass
class World:
    """A store, and mounts that recalls reach."""

    store: MemoryStore
    serving: trio.Nursery
    mounts: list[LockMount] = field(default_factory=list)

    async def mount(self, options: SessionOptions = PATIENT, hook: Hook | None = None) -> LockMount:
        handle = self.store.another()
        made = await lock_mount(handle, VOLUME, options)
        await made.hear(self.serving)
        handle.hook = hook
        self.mounts.append(made)
        return made

    async def pair(self) -> tuple[LockMount, LockMount]:
        return await self.mount(), await self.mount()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(pauses, "FIRST_S", 1000)  # after a recall the rest of a test is too soon
    store = MemoryStore()
    await make_lock_volume(store, VOLUME)
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as serving:
            made = World(store, serving)
            yield made
            serving.cancel_scope.cancel()
        for mount in made.mounts:
            await mount.lose_session()


def spent(mount: LockMount) -> int:
    """Requests since the last call."""
    requests = mount.store.requests
    mount.store.reset()
    return requests


async def refused(mount: LockMount, owner: int) -> bool:
    try:
        await mount.acquire(owner, wait=False)
    except LockConflict:
        return True
    return False


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.testing.wait_all_tasks_blocked(0.001)


# -- what it costs ----------------------------------------------------------------------------------------------------


async def test_locks_of_one_mount_cost_one_request_in_all(world: World) -> None:
    one, two = await world.pair()
    for turn in range(20):
        await one.acquire(1)
        await one.acquire(2, SHARED, ino=INO + 1)
        await one.locks.test(INO, POSIX, 3, 0, 9, SHARED)
        await one.release(2, ino=INO + 1)
        await one.release(1)
        assert spent(one) == (2 if turn == 0 else 0), "one for each inode"
    assert (one.alone, spent(two)) == ({PLACE, (INO + 1, POSIX)}, 0)


async def test_a_queue_on_one_mount_costs_nothing(world: World) -> None:
    one, _ = await world.pair()
    order: list[int] = []

    async def take(owner: int) -> None:
        await one.acquire(owner)
        order.append(owner)
        await trio.testing.wait_all_tasks_blocked()
        await one.release(owner)

    await one.acquire(99)
    spent(one)
    async with trio.open_nursery() as nursery:
        for owner in range(20):
            nursery.start_soon(take, owner)
            await trio.testing.wait_all_tasks_blocked()
        await one.release(99)
    assert order == list(range(20))
    assert (spent(one), one.store.snapshot().watch) == (0, 0)


async def test_hand_over_of_what_nobody_holds(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    await one.release(1)
    spent(one)
    await two.acquire(1)
    assert spent(two) == 2, "a look, and a place in the queue with the notice"
    assert spent(one) == 1, "it tells"
    await two.release(1)
    assert spent(two) == 1
    assert (one.in_use, two.in_use, (await in_store(world.store, one.keys))[2]) == (set(), set(), 0)


async def test_after_a_recall_locks_cost_what_they_did(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    await one.release(1)
    assert not await refused(two, 1)
    await two.release(1)
    assert one.alone == two.alone == set(), "neither who was asked nor who asked"
    for mount in (one, two):
        spent(mount)
        await mount.acquire(1)
        await mount.release(1)
        assert spent(mount) == 2


async def test_turns_of_two_mounts_cost_two_requests_each(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(99)

    async def take_turns(mount: LockMount) -> None:
        for _ in range(10):
            await mount.acquire(1)
            await trio.testing.wait_all_tasks_blocked()
            await mount.release(1)

    async with trio.open_nursery() as nursery:
        for mount in (one, two):
            nursery.start_soon(take_turns, mount)
        await until(lambda: one.locks.recalls_heard == 1)
        await until_waiting(world.store, one.keys, 2)
        spent(one), spent(two)
        await one.release(99)
    assert spent(one) + spent(two) <= 2 * 20
    assert (one.locks.recalls_heard, two.locks.recalls_heard) == (1, 0)


async def test_what_is_kept_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "KEPT_MAX", 3)
    one, _ = await world.pair()
    for ino in range(10):
        await one.acquire(1, ino=ino)
        await one.release(1, ino=ino)
    await until(lambda: len(one.alone) == 3)
    assert one.alone == {(ino, POSIX) for ino in (7, 8, 9)}
    assert (await in_store(world.store, one.keys, 0))[2] == 0


# -- what others see --------------------------------------------------------------------------------------------------


async def test_a_try_gets_what_nobody_holds(world: World) -> None:
    one, two = await world.pair()
    for kind in (POSIX, FLOCK):
        await one.acquire(1, kind=kind)
        await one.release(1, kind=kind)
        await two.acquire(1, kind=kind, wait=False)
    spent(one)
    assert await refused(one, 1)


async def test_a_try_is_refused_what_is_held(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    assert await refused(two, 1)
    await one.release(1)
    assert not await refused(two, 1)


async def test_who_stands_in_the_way_is_told_as_it_is(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1, EXCLUSIVE, 10, 19)
    await one.acquire(2, SHARED, 30, 39)
    await one.release(1)
    found = await two.locks.test(INO, POSIX, 9, 0, 99, EXCLUSIVE)
    assert found is not None
    assert (found.session, found.owner, found.start, found.end) == (one.session.number, 2, 30, 39)
    await one.release(2)
    assert await two.locks.test(INO, POSIX, 9, 0, 99, EXCLUSIVE) is None


async def test_a_kept_lock_is_not_in_the_way(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    await one.release(1)
    assert await two.locks.test(INO, POSIX, 9, 0, 99, EXCLUSIVE) is None
    assert one.alone == set()


async def test_another_mount_does_not_starve(world: World) -> None:
    one, two = await world.pair()
    turns, served = 0, False

    async def again_and_again() -> None:
        nonlocal turns
        while not served:
            await one.acquire(1)
            turns += 1
            await trio.lowlevel.checkpoint()
            await one.release(1)

    await one.acquire(1)
    await one.release(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again_and_again)
        while turns < 10:
            await trio.lowlevel.checkpoint()
        await two.acquire(1)
        served = True
        await two.release(1)
    assert one.locks.recalls_heard == 1


@pytest.mark.parametrize("at_once", [1, 50])
async def test_who_waited_before_keeps_the_place(world: World, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_recall, "PLACED_IN_TRANSACTION", at_once)
    monkeypatch.setattr(locks_module, "SLICE_S", 0.0)  # no turns
    one, two = await world.pair()
    order: list[tuple[int, int]] = []

    async def take(mount: LockMount, owner: int) -> None:
        await mount.acquire(owner)
        order.append((world.mounts.index(mount), owner))
        await trio.lowlevel.checkpoint()
        await mount.release(owner)

    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        for owner in range(4):
            nursery.start_soon(take, one, owner)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(take, two, 5)
        await until_waiting(world.store, two.keys, 5)
        nursery.start_soon(take, one, 6)
        await until_waiting(world.store, two.keys, 6)
        await one.release(99)
    assert order == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 5), (0, 6)]


# -- when something fails ---------------------------------------------------------------------------------------------


async def test_without_a_proven_lease_nothing_is_decided_here(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    await one.release(1)
    await world.store.lease_revoke(one.session.lease_id)
    one.session._valid_until = 0
    assert not await refused(two, 1)
    with pytest.raises(SessionLost):
        await one.acquire(1)


async def test_a_mount_that_does_not_answer_is_waited_for_until_its_lease_ends(world: World) -> None:
    one, two = await world.pair()
    hasty = await world.mount(SessionOptions(lease_ttl_s=600, operation_deadline_s=0, slots=4))
    await one.acquire(1)
    await one.release(1)
    one.locks._nursery = None  # it hears nothing
    with pytest.raises(DeadlineExceeded):
        await hasty.acquire(1, wait=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.acquire, 1)
        await until_waiting(world.store, two.keys, 1)
        await world.store.lease_revoke(one.session.lease_id)
    assert two.locks.holds(INO, POSIX, 1)


async def test_who_can_not_hear_recalls_keeps_nothing(world: World) -> None:
    one, two = await world.pair()
    await one.acquire(1)
    await one.release(1)
    one.inbox.hearing = False
    one.locks.deaf()
    await until(lambda: one.alone == set())
    assert (await in_store(world.store, one.keys))[2] == 0
    await one.acquire(1)
    await one.release(1)
    assert one.alone == set()
    assert not await refused(two, 1)


class Losing:
    """A hook that loses the reply, or the request, of the transactions it is told to."""

    def __init__(self) -> None:
        self.plan: list[Moment | None] = []

    async def __call__(self, moment: Moment, request: Request) -> None:
        if request.method == "txn" and moment is Moment.BEFORE:
            self._now = self.plan.pop(0) if self.plan else None
        if request.method == "txn" and self._now is moment:
            raise OutcomeUnknown("injected")


@pytest.mark.parametrize("lost", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("given_up", [False, True])
async def test_telling_is_told_in_the_end(world: World, lost: Moment, given_up: bool) -> None:
    losing = Losing()
    impatient = SessionOptions(lease_ttl_s=600, operation_deadline_s=0 if given_up else 10, slots=4)
    one, two = await world.mount(impatient, losing), await world.mount()
    order: list[int] = []

    async def take(mount: LockMount, owner: int) -> None:
        await mount.acquire(owner)
        order.append(owner)
        await mount.release(owner)

    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, one, 1)
        await trio.testing.wait_all_tasks_blocked()
        losing.plan = [lost]
        nursery.start_soon(take, two, 2)
        await until_waiting(world.store, two.keys, 2)
        await one.release(99)
    assert order == [1, 2]
    await until(lambda: one.in_use == set())
    assert (await in_store(world.store, one.keys))[:2] == ([], [])


async def test_interrupted_at_every_point_of_a_hand_over(world: World) -> None:
    one, two = await world.pair()
    for passes in range(40):
        ino = INO + passes

        async def cancelled(call: Callable[[], Awaitable[None]], passes: int = passes) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()

        await one.acquire(1, ino=ino)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled, lambda ino=ino: one.acquire(2, ino=ino))
            nursery.start_soon(cancelled, lambda ino=ino: two.acquire(3, ino=ino))
        await one.release(1, ino=ino)
        for mount, owner in ((one, 2), (two, 3)):
            await mount.release(owner, ino=ino)
        await one.acquire(4, ino=ino, wait=False)
        await one.release(4, ino=ino)
        assert not one.in_use
        assert not two.in_use
