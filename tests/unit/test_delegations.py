"""Delegations under delay: in whatever order requests, replies and recalls arrive, nothing stale is answered.

Requests and replies are delayed at random (virtual time). One writer at a time changes a thing, on a random mount;
readers on every mount ask at the same time. A read may answer what was true at some moment between its call and its
return; and nothing older than what any read that had ended before it answered.
"""

from __future__ import annotations

import random
import stat
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import NoSuchEntry, SessionLost, StoreUnavailable
from apollofs.metadata.memory import MemoryStore, Moment
from apollofs.metadata.records import ROOT_INO, Owner, SetAttr
from apollofs.metadata.returns import NoCacheAbove
from apollofs.metadata.store import Range, prefix_end
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, OPTIONS, assert_sound, make_volume, mounted

FILE = stat.S_IFREG | 0o644


@dataclass
class Thing:
    """Something with versions: `done` is the last whose write has returned or that was seen, `begun` the last begun."""

    done: int = 0
    begun: int = 0

    def check(self, floor: int, fits: Callable[[int], bool], answer: object) -> None:
        """Some version between `floor` and the newest begun must fit the answer; the oldest such has been seen."""
        fitting = [version for version in range(floor, self.begun + 1) if fits(version)]
        assert fitting, f"answered {answer}, but {floor} was there and {self.begun} is the newest"
        self.done = max(self.done, fitting[0])


class Delays:
    """A hook that delays a store's requests and replies by up to some virtual milliseconds."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def __call__(self, *_: object) -> None:
        if self._random.random() < 0.7:
            await trio.sleep(self._random.random() * self._random.choice((0.001, 0.02)))


class Schedule:
    """Two writers and twelve readers on three mounts of one volume."""

    def __init__(self, seed: int, volumes: list[Volume], directory: int, file: int) -> None:
        self.rng = random.Random(seed)
        self.volumes = volumes
        self.directory = directory
        self.file = file
        self.owner, self.subdirectory = Thing(), Thing()
        self.ended = trio.Event()

    async def run(self, rounds: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.change_owner, rounds)
            nursery.start_soon(self.toggle_subdirectory, rounds)
            for volume in self.volumes:
                for ask in (self.ask_number, self.ask_name, self.ask_listing, self.ask_nlink):
                    nursery.start_soon(self.read, ask, volume)

    async def pause(self) -> Volume:
        """Wait a little, or long enough for delegations to be taken; a mount to write on."""
        await trio.sleep(self.rng.random() * self.rng.choice((0.01, 3)))
        return self.rng.choice(self.volumes)

    async def change_owner(self, rounds: int) -> None:
        for _ in range(rounds):
            volume = await self.pause()
            self.owner.begun += 1
            await volume.setattr(self.file, SetAttr(uid=self.owner.begun))
            self.owner.done = max(self.owner.done, self.owner.begun)
        self.ended.set()

    async def toggle_subdirectory(self, rounds: int) -> None:
        for _ in range(rounds):
            volume = await self.pause()
            self.subdirectory.begun += 1
            if self.subdirectory.begun % 2:
                await volume.mkdir(self.directory, b"%d" % self.subdirectory.begun, 0o755, ME)
            else:
                await volume.rmdir(self.directory, b"%d" % (self.subdirectory.begun - 1))
            self.subdirectory.done = max(self.subdirectory.done, self.subdirectory.begun)

    async def read(self, ask: Callable[[Volume], Awaitable[None]], volume: Volume) -> None:
        while not self.ended.is_set():
            await trio.sleep(self.rng.random() * 0.05)
            await ask(volume)

    async def ask_number(self, volume: Volume) -> None:
        floor = self.owner.done
        uid = (await volume.getattr(self.file)).uid
        self.owner.check(floor, lambda version: version == uid, uid)

    async def ask_name(self, volume: Volume) -> None:
        floor = self.owner.done
        uid = (await volume.lookup(self.directory, b"f")).uid
        self.owner.check(floor, lambda version: version == uid, uid)

    async def ask_listing(self, volume: Volume) -> None:
        floor = self.subdirectory.done
        limit = self.rng.choice((1, 10))
        page = await volume.readdir(self.directory, b"", limit)
        entries = list(page.entries)
        while page.more:
            page = await volume.readdir(self.directory, entries[-1].name, limit, page.revision)
            entries += page.entries
        names = [int(entry.name) for entry in entries if entry.name != b"f"]
        self.subdirectory.check(floor, lambda version: names == ([version] if version % 2 else []), names)

    async def ask_nlink(self, volume: Volume) -> None:
        floor = self.subdirectory.done
        nlink = (await volume.getattr(self.directory)).nlink
        self.subdirectory.check(floor, lambda version: version % 2 == nlink - 2, nlink)


async def run(seed: int, rounds: int) -> None:
    """One schedule; the checker and the counters afterwards."""
    base = MemoryStore()
    await make_volume(base)
    async with AsyncExitStack() as stack:
        volumes = [await stack.enter_async_context(mounted(base.another(Delays(seed + n)))) for n in range(3)]
        directory = await volumes[0].mkdir(ROOT_INO, b"d", 0o755, ME)
        file = await volumes[0].mknod(directory.ino, b"f", FILE, 0, Owner(0, 0))
        for volume in volumes:
            await volume.lookup(ROOT_INO, b"d")
            await volume.lookup(directory.ino, b"f")
        await Schedule(seed, volumes, directory.ino, file.ino).run(rounds)
        taken = sum(volume.delegations.counts["taken"] for volume in volumes)
        recalled = sum(volume.delegations.counts["recalls_heard"] for volume in volumes)
    await assert_sound(base)
    assert taken
    assert recalled, "the protocol was not exercised"


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_stale_whatever_the_delays(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    with trio.fail_after(100_000):
        await run(seed, rounds=30)


async def test_a_name_is_gone_everywhere_when_unlink_has_returned() -> None:
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as a, mounted(store) as b:
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        for step in range(20):
            name = b"%d" % step
            await a.mknod(directory.ino, name, FILE, 0, ME)
            for _ in range(3):
                await b.lookup(directory.ino, name)
                await a.lookup(directory.ino, name)
            await (a, b)[step % 2].unlink(directory.ino, name)
            for volume in (a, b):
                with pytest.raises(NoSuchEntry):
                    await volume.lookup(directory.ino, name)
    await assert_sound(store)


async def test_room_is_made_one_directory_after_the_other() -> None:
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as volume:
        await trio.testing.wait_all_tasks_blocked()
        made = [await volume.mkdir(ROOT_INO, b"d%d" % number, 0o755, ME) for number in range(3)]
        cache = volume.delegations.cache
        assert list(cache.groups) == [inode.ino for inode in made]
        for _ in range(5):
            volume.delegations.make_room()
        assert list(cache.groups) == [inode.ino for inode in made[1:]]
        await trio.testing.wait_all_tasks_blocked()
        volume.delegations.make_room()
        assert list(cache.groups) == [made[2].ino]
    await assert_sound(store)


async def test_a_file_with_several_names_is_a_group_of_its_own() -> None:
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as a, mounted(store) as b:
        file = await a.mknod(ROOT_INO, b"1", FILE, 0, ME)
        await a.link(file.ino, ROOT_INO, b"2")
        for _ in range(4):
            for name in (b"1", b"2"):
                found = await b.lookup(ROOT_INO, name)
                assert (found.nlink, found.size_bytes, found.mode) == (2, 0, FILE)
        await a.setattr(file.ino, SetAttr(mode=0o600))
        assert (await b.getattr(file.ino)).mode == stat.S_IFREG | 0o600
    await assert_sound(store)


class Stuck(NoCacheAbove):
    """A cache above that never lets go of anything."""

    def holds(self, group: int) -> bool:
        return True

    async def drop(self, group: int) -> None:
        await trio.sleep_forever()


class Noting(NoCacheAbove):
    """Notes who is not to be waited for."""

    def __init__(self) -> None:
        self.hurried: set[int] = set()
        self.calmed: set[int] = set()

    def hurry(self, group: int) -> None:
        self.hurried.add(group)

    def calm(self, group: int) -> None:
        self.calmed.add(group)


async def test_locks_are_waited_for_again_when_the_operation_that_held_them_has_ended() -> None:
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as a, mounted(store) as b:
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        above = Noting()
        b.delegations.put_above(above)
        await b.mknod(directory.ino, b"f", FILE, 0, ME)
    assert directory.ino in above.hurried
    assert above.calmed == above.hurried
    await assert_sound(store)


@pytest.mark.parametrize("delegations", [True, False])
async def test_who_gives_up_while_the_store_is_away_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, delegations: bool
) -> None:
    """Nobody could hold the directory while a key says that somebody waits for it."""
    del autojump_clock
    base, away = MemoryStore(), False

    async def hook(moment: Moment, _: object) -> None:
        await trio.lowlevel.checkpoint()
        if away and moment is Moment.BEFORE:
            raise StoreUnavailable("away")

    await make_volume(base)
    async with (
        mounted(base) as a,
        mounted(base.another(hook), replace(OPTIONS, lease_ttl_s=60, delegations=delegations)) as b,
    ):
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        a.delegations.put_above(Stuck())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.mknod, directory.ino, b"f", FILE, 0, ME)
            await trio.testing.wait_all_tasks_blocked()
            line = Range(b._keys.writers_on(directory.ino), prefix_end(b._keys.writers_on(directory.ino)))
            assert (await base.range(line)).kvs
            away = True
            nursery.cancel_scope.cancel()
        a.delegations.put_above(NoCacheAbove())
        assert (await base.range(line)).kvs
        away = False
        with trio.fail_after(30):
            while (await base.range(line)).kvs:
                await trio.testing.wait_all_tasks_blocked(0.01)
    await assert_sound(base)


@pytest.mark.expects_log("has lost its lease")
async def test_who_waits_for_a_delegation_does_not_outlast_the_session(autojump_clock: trio.testing.MockClock) -> None:
    """The notices of a recall go with the session that asked: nobody would ever answer."""
    del autojump_clock
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as a, mounted(store) as b:
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        a.delegations.put_above(Stuck())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_loses_its_session, b, directory.ino)
            await trio.testing.wait_all_tasks_blocked()
            await store.lease_revoke(b.session.lease_id)
        a.delegations.put_above(NoCacheAbove())
    await assert_sound(store)


async def _loses_its_session(volume: Volume, directory: int) -> None:
    with pytest.raises(SessionLost):
        await volume.mknod(directory, b"f", FILE, 0, ME)
