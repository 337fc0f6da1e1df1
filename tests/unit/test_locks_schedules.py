"""Random schedules of many owners on three mounts: exclusion always holds, and everybody comes to an end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from apollofs.metadata import pauses
from apollofs.metadata.errors import LockConflict, LockDeadlock, OutcomeUnknown, StoreUnavailable
from apollofs.metadata.locks import LockKind, LockType
from apollofs.metadata.memory import Hook, MemoryStore, Moment, Request
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
)

BYTES = 8
VOLUME = "locks"
SEEDS, SEEDS_FAULTS = 25, 12


@dataclass
class Oracle:
    """Each byte by itself: who says that he has it, and how."""

    held: dict[tuple[int, int, int], LockType] = field(default_factory=dict)
    """By mount, owner, byte."""
    granted: int = 0
    deadlocks: int = 0
    recalls: int = 0

    def grant(self, mount: int, owner: int, start: int, end: int, type_: LockType) -> None:
        for (other_mount, other, byte), theirs in self.held.items():
            if (other_mount, other) != (mount, owner) and start <= byte <= end:
                assert type_ is SHARED and theirs is SHARED, "two owners hold what excludes each other"
        for byte in range(start, end + 1):
            self.held[mount, owner, byte] = type_
        self.granted += 1

    def give_back(self, mount: int, owner: int, start: int, end: int) -> None:
        for byte in range(start, end + 1):
            self.held.pop((mount, owner, byte), None)


class Owner:
    """Locks and unlocks ranges at random; whoever is told of a deadlock gives back everything."""

    def __init__(self, rng: random.Random, oracle: Oracle, mount: LockMount, index: int, owner: int, kind: LockKind):
        self.rng = rng
        self.oracle = oracle
        self.mount = mount
        self.index = index
        self.owner = owner
        self.kind = kind

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self._pause()
            if self.rng.random() < 0.6:
                await self._lock()
            else:
                await self._unlock(*self._range())
        await self._unlock(0, BYTES - 1)

    async def look(self, steps: int) -> None:
        """Ask now and then what stands in the way of nobody's lock."""
        for _ in range(steps):
            await self._pause()
            found = await self.mount.locks.test(INO, self.kind, 1 << 40, *self._range(), EXCLUSIVE)
            assert found is None or found.owner < 100

    def _range(self) -> tuple[int, int]:
        if self.kind is FLOCK:
            return 0, BYTES - 1
        start = self.rng.randrange(BYTES)
        return start, self.rng.randrange(start, BYTES)

    async def _pause(self) -> None:
        for _ in range(self.rng.randrange(6)):
            await trio.lowlevel.checkpoint()

    async def _lock(self) -> None:
        start, end = self._range()
        type_ = self.rng.choice([SHARED, EXCLUSIVE])
        wait = self.rng.random() < 0.7
        if self.kind is FLOCK:
            self.oracle.give_back(self.index, self.owner, start, end)  # a conversion may lose it on the way
        elif type_ is SHARED:
            self._expect_downgrade(start, end)
        with trio.CancelScope() as scope:
            if wait and self.rng.random() < 0.25:
                trio.lowlevel.spawn_system_task(self._cancel_soon, scope, self.rng.randrange(40))
            try:
                await self.mount.acquire(self.owner, type_, start, end, wait=wait, kind=self.kind)
            except LockConflict:
                return
            except LockDeadlock:
                self.oracle.deadlocks += 1
                await self._unlock(0, BYTES - 1)
                return
            self.oracle.grant(self.index, self.owner, start, end, type_)

    def _expect_downgrade(self, start: int, end: int) -> None:
        """From the store's grant on others may share, even before the call has returned."""
        for byte in range(start, end + 1):
            if (self.index, self.owner, byte) in self.oracle.held:
                self.oracle.held[self.index, self.owner, byte] = SHARED

    @staticmethod
    async def _cancel_soon(scope: trio.CancelScope, passes: int) -> None:
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def _unlock(self, start: int, end: int) -> None:
        self.oracle.give_back(self.index, self.owner, start, end)
        await self.mount.release(self.owner, start, end, kind=self.kind)


def disturbed(rng: random.Random, *, faults: bool) -> Hook:
    """Requests and replies take their time, and with `faults` some of them are lost."""

    async def hook(moment: Moment, request: Request) -> None:
        if request.method != "watch":
            for _ in range(rng.randrange(4)):
                await trio.lowlevel.checkpoint()
        if faults and request.method == "txn" and rng.random() < 0.01:
            refused = StoreUnavailable if moment is Moment.BEFORE else OutcomeUnknown
            raise rng.choice([OutcomeUnknown, refused])("injected")

    return hook


async def run_schedule(seed: int, kind: LockKind, store: MemoryStore, *, faults: bool, alone: bool) -> Oracle:
    rng = random.Random(seed)
    await make_lock_volume(store, VOLUME)
    mounts = [await lock_mount(store.another(), VOLUME) for _ in range(rng.randint(2, 3))]
    oracle = Oracle()
    async with trio.open_nursery() as serving:
        for mount in mounts:
            if alone:
                await mount.hear(serving)
            mount.store._store.hook = disturbed(rng, faults=faults)  # type: ignore[attr-defined]  # a MemoryStore
        with trio.fail_after(BOUND_S):
            async with trio.open_nursery() as nursery:
                for number in range(rng.randint(3, 7)):
                    index = number % len(mounts)
                    owner = Owner(random.Random(rng.random()), oracle, mounts[index], index, number, kind)
                    nursery.start_soon(owner.run, 15)
                    if alone and rng.random() < 0.3:
                        nursery.start_soon(owner.look, 15)
        for mount in mounts:
            mount.store._store.hook = None  # type: ignore[attr-defined]  # likewise
            await mount.locks.mend()
            assert mount.in_use == set(), "something is remembered of locks that are gone"
        assert (await in_store(store, mounts[0].keys, INO, kind))[:2] == ([], [])
        oracle.recalls = sum(mount.locks.recalls_heard for mount in mounts)
        serving.cancel_scope.cancel()
    for mount in mounts:
        await mount.lose_session()
    return oracle


@pytest.mark.parametrize("kind", [POSIX, FLOCK])
@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("alone", [False, True])
async def test_random_schedules(kind: LockKind, faults: bool, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "FIRST_S", 0)  # so that mounts decide alone as often as can be
    granted = deadlocks = recalls = 0
    for seed in range(SEEDS_FAULTS if faults else SEEDS):
        store = MemoryStore()
        oracle = await run_schedule(seed, kind, store, faults=faults, alone=alone)
        granted += oracle.granted
        deadlocks += oracle.deadlocks
        recalls += oracle.recalls
    assert granted > 100
    assert kind is POSIX or deadlocks == 0
    assert bool(recalls) is alone


async def test_first_come_first_served_over_mounts() -> None:
    """Exclusive locks on the whole file are granted in the order of the store's queue, whatever the mounts do."""
    store = MemoryStore()
    await make_lock_volume(store, VOLUME)
    mounts = [await lock_mount(store.another(), VOLUME) for _ in range(3)]
    rng = random.Random(3)
    with trio.fail_after(BOUND_S):
        await mounts[0].acquire(1000)
        order: list[int] = []

        async def take(mount: LockMount, owner: int) -> None:
            await mount.acquire(owner)
            order.append(owner)
            for _ in range(rng.randrange(5)):
                await trio.lowlevel.checkpoint()
            await mount.release(owner)

        async with trio.open_nursery() as nursery:
            for owner in range(30):
                nursery.start_soon(take, rng.choice(mounts), owner)
            queue: list[int] = []
            while len(queue) < 30:
                await trio.testing.wait_all_tasks_blocked()
                queue = [lock.owner for lock in (await in_store(store, mounts[0].keys, INO))[1]]
            await mounts[0].release(1000)
        assert order == queue
