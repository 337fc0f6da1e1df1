"""A lock for which several processes of several mounts wait: a mount passes it on among its own for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from apollofs.metadata import lock_turns, pauses
from apollofs.metadata import locks as locks_module
from apollofs.metadata.errors import DeadlineExceeded, LockConflict, OutcomeUnknown
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.session import SessionOptions
from tests.support.lock_mounts import (
    BOUND_S,
    EXCLUSIVE,
    INO,
    POSIX,
    LockMount,
    in_store,
    lock_mount,
    lock_mounts,
    until_waiting,
)

FOREVER_S = 1e6
IMPATIENT = SessionOptions(lease_ttl_s=600, operation_deadline_s=0, slots=4)
Mounts = tuple[LockMount, LockMount]


@pytest.fixture
async def mounts(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mounts]:
    """Two that wait for each other: neither decides alone, but in its turn."""
    monkeypatch.setattr(pauses, "FIRST_S", 1000)
    with trio.fail_after(BOUND_S):
        async with lock_mounts(MemoryStore(), "locks", 2) as (one, two), trio.open_nursery() as serving:
            for mount in (one, two):
                await mount.hear(serving)
            await one.acquire(1)
            with pytest.raises(LockConflict):
                await two.acquire(1, wait=False)
            await one.release(1)
            yield one, two
            serving.cancel_scope.cancel()


def end_turns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "SLICE_S", 1e-9)
    monkeypatch.setattr(lock_turns, "TRANSACTIONS_IN_SLICE", 0)


class Line:
    """Processes that take the lock one after the other, and what order that was."""

    def __init__(self, mounts: Mounts, nursery: trio.Nursery) -> None:
        self._mounts = mounts
        self._nursery = nursery
        self.order: list[tuple[int, int]] = []

    async def add(self, number: int, owner: int) -> None:
        """One more waits. `number` says at which mount."""
        before = len((await in_store(self._mounts[0].store, self._mounts[0].keys))[1])
        self._nursery.start_soon(self._take, number, owner)
        await until_waiting(self._mounts[0].store, self._mounts[0].keys, before + 1)

    async def _take(self, number: int, owner: int) -> None:
        await self._mounts[number].acquire(owner)
        self.order.append((number, owner))
        await trio.testing.wait_all_tasks_blocked()
        with contextlib.suppress(DeadlineExceeded):
            await self._mounts[number].release(owner)


async def test_own_processes_first_and_for_nothing(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "SLICE_S", FOREVER_S)
    one, two = mounts
    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        line = Line(mounts, nursery)
        for number, owner in ((0, 1), (1, 2), (0, 3), (1, 4), (0, 5)):
            await line.add(number, owner)
        one.store.reset()
        two.store.reset()
        await one.release(99)
    assert line.order == [(0, 1), (0, 3), (0, 5), (1, 2), (1, 4)]
    assert one.store.requests == 2, "its turn, and the end of it"
    assert two.store.requests == 1, "likewise, and nobody waits for the end of it"


async def test_after_its_turn_a_mount_comes_behind_all_others(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    end_turns_at_once(monkeypatch)
    one, _ = mounts
    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        line = Line(mounts, nursery)
        for number, owner in ((0, 1), (0, 3), (1, 2), (1, 4)):
            await line.add(number, owner)
        await one.release(99)
        while len(line.order) < 4:
            await trio.testing.wait_all_tasks_blocked()
    assert line.order.index((1, 2)) < line.order.index((0, 3))
    assert one.locks.turns > 0
    assert (await in_store(one.store, one.keys))[2] == 0


async def test_what_is_held_when_a_turn_ends_is_passed_on(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "SLICE_S", FOREVER_S)
    one, two = mounts
    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.acquire, 1)
        await until_waiting(two.store, two.keys, 1)
        await one.release(99)
        line = Line(mounts, nursery)
        await line.add(1, 2)
        nursery.start_soon(one.acquire, 3)
        await trio.testing.wait_all_tasks_blocked()
        board = one.locks._boards[INO, POSIX]
        board._turn_ends = trio.current_time()
        await board.tell()
        assert [waiter.placed for waiter in board.waiters] == [True]
        await one.release(1)
    assert line.order == [(1, 2)]
    await one.release(3)


async def test_in_a_turn_a_try_is_answered_when_it_is_over(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    end_turns_at_once(monkeypatch)
    one, two = mounts
    await one.acquire(99)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.acquire, 1)
        await until_waiting(two.store, two.keys, 1)
        await one.release(99)
    with pytest.raises(LockConflict):
        await two.acquire(1, wait=False)
    found = await two.locks.test(INO, POSIX, 1, 0, 9, EXCLUSIVE)
    assert found is not None
    assert found.owner == 1
    await one.release(1)


@pytest.mark.parametrize("lost", [Moment.BEFORE, Moment.AFTER])
async def test_a_turn_in_doubt_is_over_and_who_waits_still_does(lost: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "FIRST_S", 1000)
    monkeypatch.setattr(locks_module, "SLICE_S", FOREVER_S)
    store = MemoryStore()
    handle = store.another()
    with trio.fail_after(BOUND_S):
        async with lock_mounts(store, "locks", 1) as (two,), trio.open_nursery() as serving:
            one = await lock_mount(handle, "locks", IMPATIENT)
            for mount in (one, two):
                await mount.hear(serving)
            await two.acquire(7)
            async with trio.open_nursery() as nursery:
                line = Line((one, two), nursery)
                for number, owner in ((0, 1), (0, 3), (1, 2)):
                    await line.add(number, owner)
                losing = Losing(one, lost)
                handle.hook = losing
                await two.release(7)
            assert losing.done
            assert sorted(line.order) == [(0, 1), (0, 3), (1, 2)]
            assert (await in_store(store, two.keys))[:2] == ([], [])
            serving.cancel_scope.cancel()
        await one.lose_session()


class Losing:
    """Loses the transaction that begins a turn, or its reply; who sent it gives up."""

    def __init__(self, mount: LockMount, lost: Moment) -> None:
        self._mount = mount
        self._lost = lost
        self.done = False

    async def __call__(self, moment: Moment, request: Request) -> None:
        board = self._mount.locks._boards.get((INO, POSIX))
        begins = board is not None and board._turn_ends > 0 and not board.alone
        if begins and request.method == "txn" and not self.done and moment is self._lost:
            self.done = True
            raise OutcomeUnknown("injected")
