"""What locks cost: requests to the store, watches, memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from apollofs.metadata import locks as locks_module
from apollofs.metadata.errors import LockConflict, TooManyLocks
from apollofs.metadata.lock_records import RANGES_MAX
from apollofs.metadata.memory import MemoryStore
from tests.support.lock_mounts import (
    BOUND_S,
    EXCLUSIVE,
    INO,
    POSIX,
    SHARED,
    LockMount,
    in_store,
    lock_mounts,
    until_waiting,
)

Mounts = tuple[LockMount, LockMount]


@pytest.fixture
async def mounts() -> AsyncIterator[Mounts]:
    with trio.fail_after(BOUND_S):
        async with lock_mounts(MemoryStore(), "locks", 2) as (one, two):
            yield one, two


def spent(mount: LockMount) -> int:
    """Requests since the last call."""
    requests = mount.store.requests
    mount.store.reset()
    return requests


async def test_uncontended(mounts: Mounts) -> None:
    one, two = mounts
    for _ in range(3):
        await one.acquire(1)
        assert spent(one) == 1
        await one.release(1)
        assert spent(one) == 1
    await two.acquire(1)
    assert spent(two) == 1
    assert await one.locks.test(INO, POSIX, 1, 0, 9, SHARED) is not None
    assert spent(one) == 1


async def test_many_ranges_of_many_owners_on_one_mount(mounts: Mounts) -> None:
    one, _ = mounts
    for number in range(20):
        await one.acquire(number, EXCLUSIVE, 10 * number, 10 * number + 9)
        assert spent(one) == 1
    assert (await in_store(one.store, one.keys))[2] == 1


async def test_what_is_known_here_costs_nothing(mounts: Mounts) -> None:
    one, _ = mounts
    await one.acquire(1, EXCLUSIVE, 0, 99)
    spent(one)
    await one.acquire(1, EXCLUSIVE, 10, 19)
    with pytest.raises(LockConflict):
        await one.acquire(2, SHARED, 50, 50, wait=False)
    await one.release(1, 100, 200)
    await one.release(3)
    await one.release(1, ino=INO + 1)
    assert one.locks.holds(INO, POSIX, 1)
    assert not one.locks.holds(INO, POSIX, 2)
    assert spent(one) == 0


async def test_a_reader_beside_readers_asks_twice(mounts: Mounts) -> None:
    one, two = mounts
    await one.acquire(1, SHARED)
    await two.acquire(1, SHARED)
    assert spent(two) == 2
    await two.acquire(2, SHARED)
    assert spent(two) == 1


async def test_a_refusal_is_never_a_guess(mounts: Mounts) -> None:
    one, two = mounts
    await one.acquire(1, SHARED)
    await two.acquire(1, SHARED)
    await one.release(1)
    spent(two)
    await two.acquire(1, EXCLUSIVE, wait=False)
    assert spent(two) == 2


async def test_a_queue_on_one_mount_costs_two_requests_a_turn(mounts: Mounts) -> None:
    one, _ = mounts
    turns = 20

    async def take(owner: int) -> None:
        await one.acquire(owner)
        await trio.testing.wait_all_tasks_blocked()
        await one.release(owner)

    await one.acquire(99)
    spent(one)
    async with trio.open_nursery() as nursery:
        for owner in range(turns):
            nursery.start_soon(take, owner)
        while len(one.locks._boards[INO, POSIX].waiters) < turns:
            await trio.testing.wait_all_tasks_blocked()
        assert one.store.snapshot().requests == turns
        assert one.store.snapshot().watch == 1
        await one.release(99)
    counts = one.store.snapshot()
    assert counts.requests == 2 * turns + 1, "a place in the queue, and its end"
    assert counts.watch == 1, "the watch goes from hand to hand"


async def test_waiting_for_another_mount(mounts: Mounts) -> None:
    one, two = mounts
    await one.acquire(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.acquire, 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert two.store.snapshot().requests == 2, "a look, and a place in the queue"
        await one.release(1)
    assert two.store.snapshot().requests == 2, "it has the lock by its position"
    assert two.store.snapshot().watch == 1


async def test_nothing_is_remembered_without_a_lock(mounts: Mounts) -> None:
    one, two = mounts
    for ino in range(50):
        await one.acquire(1, ino=ino)
        with pytest.raises(LockConflict):
            await two.acquire(1, ino=ino, wait=False)
        await one.locks.test(ino, POSIX, 2, 0, 9, SHARED)
        await one.release(1, ino=ino)
    assert one.in_use == set()
    assert two.in_use == set()


async def test_too_many_ranges_change_nothing(mounts: Mounts) -> None:
    one, _ = mounts
    board_limit = RANGES_MAX
    await one.acquire(1)
    board = one.locks._boards[INO, POSIX]
    (whole,) = board.held
    board.held = tuple(type(whole)(whole.session, 1, 4 * n, 4 * n + 2, EXCLUSIVE, 1) for n in range(board_limit))
    before = board.held
    with pytest.raises(TooManyLocks):
        await one.acquire(1, EXCLUSIVE, 4 * board_limit, 4 * board_limit)
    with pytest.raises(TooManyLocks):
        await one.release(1, 1, 1)
    assert board.held == before


async def test_too_many_requests(mounts: Mounts, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = mounts
    monkeypatch.setattr(locks_module, "ACQUIRING_MAX", 2)
    await two.acquire(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.acquire, 1)
        nursery.start_soon(one.acquire, 2)
        await until_waiting(two.store, two.keys, 2)
        with pytest.raises(TooManyLocks):
            await one.acquire(3)
        nursery.cancel_scope.cancel()
    await one.acquire(3, ino=INO + 1)
    assert (await in_store(two.store, two.keys))[1] == []
