"""Turns: mounts that change one directory at the same time have it one after the other. Time is virtual here; each
request takes a millisecond of it."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import EntryExists, NoSuchEntry, StaleInode
from apollofs.metadata.exclusives import Exclusion
from apollofs.metadata.groups import Acquisition
from apollofs.metadata.keys import Keys
from apollofs.metadata.locks import RANGE_END, LockKind, LockType
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Op, Put
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, VOLUME, assert_sound, make_volume, mounted

KEYS = Keys(VOLUME)
FILE = stat.S_IFREG | 0o644
STEP_S = 0.0002
"""What a process does between two calls."""


class Line:
    """A hook: requests take their time, and are counted. What `holds_back` says of a transaction's writes waits for
    `go`."""

    def __init__(self) -> None:
        self.writes = 0
        self.held_back = trio.Event()
        self.go = trio.Event()
        self.holding = False

    def holds_back(self, writes: Sequence[Op]) -> bool:
        """Of a link, which gives the file a key of its own."""
        return self.holding and any(isinstance(op, Put) and op.key.startswith(KEYS.inodes) for op in writes)

    async def __call__(self, moment: Moment, request: Request) -> None:
        if moment is Moment.AFTER:
            return
        await trio.sleep(0.001)
        if request.method == "txn":
            _, then, _ = request.arguments
            assert isinstance(then, Sequence)
            self.writes += any(isinstance(op, Put) for op in then)
            if self.holds_back(then):
                self.holding = False
                self.held_back.set()
                await self.go.wait()


class World:
    """Three mounts of one volume, of which the first two have changed one directory in turn until they compete."""

    def __init__(self, base: MemoryStore, volumes: list[Volume], lines: list[Line], directory: int) -> None:
        self.base = base
        self.volumes = volumes
        self.lines = lines
        self.directory = directory
        self.made: list[bytes] = []

    async def make(self, at: int, name: bytes) -> None:
        await trio.sleep(STEP_S)
        await self.volumes[at].mknod(self.directory, name, FILE, 0, ME)
        self.made.append(name)

    async def make_many(self, at: int, names: int, letter: bytes) -> None:
        for number in range(names):
            await self.make(at, b"%s%d" % (letter, number))

    async def keep_making(self, at: int, letter: bytes, ended: trio.Event) -> None:
        number = 0
        while not ended.is_set():
            await self.make(at, b"%s%d" % (letter, number))
            number += 1

    async def compete(self) -> None:
        async with trio.open_nursery() as nursery:
            for at in (0, 1):
                nursery.start_soon(self.make_many, at, 30, b"first-%d-" % at)
        assert all(self.turns(at) for at in (0, 1)), "else nothing is tested"

    def turns(self, at: int) -> int:
        return self.volumes[at].delegations.turns.taken

    def missed(self) -> int:
        return sum(volume.delegations.turns.missed for volume in self.volumes)

    async def names(self, at: int) -> list[bytes]:
        return [entry.name for entry in (await self.volumes[at].readdir(self.directory, b"", 10_000)).entries]


@asynccontextmanager
async def competing() -> AsyncIterator[World]:
    """The mounts, of which two compete; afterwards all see what was made, and nobody has waited in vain."""
    base, lines = MemoryStore(), [Line(), Line(), Line()]
    await make_volume(base)
    with trio.fail_after(1000):
        async with AsyncExitStack() as stack:
            volumes = [await stack.enter_async_context(mounted(base.another(line))) for line in lines]
            await trio.sleep(1)
            directory = (await volumes[0].mkdir(ROOT_INO, b"d", 0o755, ME)).ino
            world = World(base, volumes, lines, directory)
            await world.compete()
            yield world
            for at in range(len(volumes)):
                assert await world.names(at) == sorted(world.made)
            assert not world.missed()
    await assert_sound(base)


async def test_mounts_that_compete_change_many_names_with_each_request(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with competing() as world:
        before = sum(line.writes for line in world.lines)
        async with trio.open_nursery() as nursery:
            for at in (0, 1):
                nursery.start_soon(world.make_many, at, 500, b"%d-" % at)
        writes = sum(line.writes for line in world.lines) - before
        assert writes < 500, "half of what is made in etcd one by one"


async def test_who_waits_has_its_turn_however_busy_the_others_are(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with competing() as world:
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            for at in (0, 2):
                nursery.start_soon(world.keep_making, at, b"%d-" % at, ended)
            await world.make_many(1, 500, b"mine")
            ended.set()
        assert world.turns(1) > 1


async def test_who_only_reads_sees_what_is_made_during_a_turn(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with competing() as world:
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.keep_making, 0, b"0-", ended)
            for _ in range(20):
                await trio.sleep(0.05)
                done = world.made[-1]
                assert (await world.volumes[2].lookup(world.directory, done)).mode == FILE
            ended.set()


async def test_a_large_directory_has_no_turns(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    del autojump_clock
    async with competing() as world:
        monkeypatch.setattr("apollofs.metadata.turns.ENTRIES_MAX", 3)
        async with trio.open_nursery() as nursery:
            for at in (0, 1):
                nursery.start_soon(world.make_many, at, 20, b"%d-" % at)
        before = [world.turns(at) for at in (0, 1)]
        async with trio.open_nursery() as nursery:
            for at in (0, 1):
                nursery.start_soon(world.make_many, at, 20, b"then-%d-" % at)
        assert [world.turns(at) for at in (0, 1)] == before


async def test_an_operation_that_waits_in_line_does_not_wait_for_a_turn_behind_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A second name is made in the store, even in a turn: there it turns out that the other mount has it now, and that
    the name is taken."""
    del autojump_clock
    async with competing() as world:
        await world.make(0, b"old")
        await world.volumes[0].settle()
        file = (await world.volumes[0].lookup(world.directory, b"old")).ino
        line = world.lines[0]
        line.holding = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_finds_it_taken, world.volumes[0], file, world.directory, b"new")
            await line.held_back.wait()
            await world.make(1, b"new")
            line.go.set()


async def _finds_it_taken(volume: Volume, file: int, directory: int, name: bytes) -> None:
    with pytest.raises(EntryExists):
        await volume.link(file, directory, name)


async def test_nobody_waits_for_a_turn_on_what_is_gone(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with competing() as world:
        for name in world.made:
            await world.volumes[0].unlink(world.directory, name)
        world.made.clear()
        await world.make(1, b"last")
        await world.volumes[0].unlink(world.directory, world.made.pop())
        assert world.volumes[0].delegations.cache.is_exclusive(world.directory)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_finds_nothing, world.volumes[1], world.directory)
            await world.volumes[0].rmdir(ROOT_INO, b"d")
        world.directory = (await world.volumes[0].mkdir(ROOT_INO, b"another", 0o755, ME)).ino


async def _finds_nothing(volume: Volume, directory: int) -> None:
    with pytest.raises((NoSuchEntry, StaleInode)):
        await volume.mknod(directory, b"late", FILE, 0, ME)


async def test_with_who_only_reads_nobody_competes(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    with trio.fail_after(1000):
        async with mounted(base.another(Line())) as one, mounted(base.another(Line())) as two:
            await trio.sleep(1)
            directory = (await one.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
            for number in range(30):
                await one.mknod(directory, b"%d" % number, FILE, 0, ME)
                await two.lookup(directory, b"%d" % number)
                if number % 10 == 9:
                    await trio.sleep(60)  # then the reader takes its delegation again
            assert two.delegations.statistics()["recalls_heard"] > 1, "else nothing is tested"
            assert one.delegations.turns.taken == 0


async def test_what_another_mount_goes_on_reading_stays_shared(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    with trio.fail_after(1000):
        async with mounted(base.another(Line())) as one, mounted(base.another(Line())) as two:
            await trio.sleep(1)
            directory = (await one.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
            for number in range(400):
                await one.mknod(directory, b"%d" % number, FILE, 0, ME)
                await two.lookup(directory, b"%d" % number)
                await trio.sleep(0.02)
            assert two.delegations.statistics()["recalls_heard"] > 1, "else nothing is tested"
            assert one.delegations.exclusives.shared == 1


async def test_with_a_lock_goes_the_directory(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with competing() as world:
        one, two = world.volumes[:2]
        whole = (77, LockKind.FLOCK, 1, 0, RANGE_END, LockType.EXCLUSIVE, 1)
        await one.locks.acquire(*whole, wait=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(two.locks.acquire, *whole, wait=True))
            await trio.sleep(0.01)
            await world.make(0, b"under the lock")
            held = one.delegations.cache.groups.get(world.directory)
            assert held is not None
            assert held.in_turns, "else nothing is tested"
            await one.locks.release(77, LockKind.FLOCK, 1)
        assert not one.delegations.cache.is_exclusive(world.directory)
        await two.locks.release(77, LockKind.FLOCK, 1)


async def test_a_claim_that_lands_while_a_turn_is_taken_ends_it() -> None:
    """What the claim put is deleted then, and with it what the turn has put under the same key."""
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as volume:
        delegations = volume.delegations
        acquisition = delegations._acquiring[ROOT_INO] = Acquisition()
        claim = Exclusion(ROOT_INO, 1, delegations.exclusives.key(volume.session, ROOT_INO))
        delegations.exclusives.land([claim], applied=True)
        del delegations._acquiring[ROOT_INO]
        assert acquisition.shared
