"""Write-back under random schedules and misfortunes: what has been answered is seen everywhere, or lost from its end.

Requests and replies are delayed at random (virtual time), and may fail for a while. Each worker changes names that
nobody else changes, in bursts, on one mount, and looks at them from any mount as soon as a change has been answered:
it must find exactly what it has done.
"""

from __future__ import annotations

import contextlib
import random
import stat
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import NoSuchEntry, OutcomeUnknown, SessionLost, StaleInode, StoreUnavailable
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import ROOT_INO, BodyChange, SetAttr
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, VOLUME, assert_sound, make_volume, mounted

FILE = stat.S_IFREG | 0o644
KEYS = Keys(VOLUME)
NAMES = 6
"""How many each worker has in a directory."""


class Network:
    """A hook: requests and replies take some virtual milliseconds; with `outages` transactions fail now and then, for
    seconds, less than a lease, applied or not."""

    def __init__(self, seed: int, *, outages: bool) -> None:
        self._random = random.Random(seed)
        self._outages = outages
        self._until = 0.0

    async def __call__(self, moment: Moment, request: Request) -> None:
        rng = self._random
        if rng.random() < 0.7:
            await trio.sleep(rng.random() * rng.choice((0.001, 0.02)))
        if request.method != "txn" or not self._outages:
            return
        if rng.random() < 0.01 and trio.current_time() > self._until + 4:
            self._until = trio.current_time() + rng.random() * 3
        if trio.current_time() < self._until:
            if moment is Moment.AFTER or rng.random() < 0.5:
                raise OutcomeUnknown("the connection was cut by the test")
            raise StoreUnavailable("the store is unreachable, says the test")


class Worker:
    """One process of one mount, with names of its own in a private and in a shared directory."""

    def __init__(self, rng: random.Random, number: int, volumes: list[Volume], directories: list[int]) -> None:
        self.rng = rng
        self.number = number
        self.volumes = volumes
        self.volume = volumes[number % len(volumes)]
        self.directories = directories
        self.there: dict[tuple[int, bytes], int] = {}
        """The mode of each name."""

    async def run(self, rounds: int) -> None:
        rng = self.rng
        for _ in range(rounds):
            await trio.sleep(rng.random() * rng.choice((0.001, 0.01, 1.5)))
            directory = rng.choice(self.directories)
            for _ in range(rng.choice((1, 2, 8))):
                place = (directory, b"%d-%d" % (self.number, rng.randrange(NAMES)))
                await self.change(*place)
                if rng.random() < 0.3:
                    await self.look(rng.choice(self.volumes), *place)
            if rng.random() < 0.3:
                await self.list(rng.choice(self.volumes), directory)

    async def change(self, directory: int, name: bytes) -> None:
        place, mode = (directory, name), self.rng.randrange(0o1000)
        if place not in self.there:
            inode = await self.volume.mknod(directory, name, stat.S_IFREG | mode, 0, ME)
            if self.rng.random() < 0.5:
                await self.volume.commit_body(inode.ino, BodyChange(inode.body_version, 1, inline=b"x"))
        elif self.rng.random() < 0.5:
            inode = await self.volume.lookup(directory, name)
            await self.volume.setattr(inode.ino, SetAttr(mode=mode))
        elif self.rng.random() < 0.8:
            await self.volume.unlink(directory, name)
            del self.there[place]
            return
        else:
            target = b"%s'" % name
            await self.volume.rename(directory, name, directory, target)
            self.there[(directory, target)] = self.there.pop(place)
            await self.look(self.rng.choice(self.volumes), directory, target)
            await self.volume.unlink(directory, target)
            del self.there[(directory, target)]
            return
        self.there[place] = mode

    async def look(self, volume: Volume, directory: int, name: bytes) -> None:
        try:
            seen: int | None = stat.S_IMODE((await volume.lookup(directory, name)).mode)
        except NoSuchEntry:
            seen = None
        assert seen == self.there.get((directory, name)), (volume is self.volume, name)

    async def list(self, volume: Volume, directory: int) -> None:
        page = await volume.readdir(directory, b"", 1000)
        mine = b"%d-" % self.number
        seen = [entry.name for entry in page.entries if entry.name.startswith(mine)]
        assert seen == sorted(name for where, name in self.there if where == directory)


async def noise(rng: random.Random, volume: Volume, directories: list[int]) -> None:
    """Reads of everything, all the time: their replies come late, and must not replace what was changed meanwhile."""
    while True:
        await trio.sleep(rng.random() * rng.choice((0.01, 0.2)))
        page = await volume.readdir(rng.choice(directories), b"", 1000)
        for entry in rng.sample(page.entries, min(2, len(page.entries))):
            volume.forget(entry.ino)  # and with it the body: it is asked for again
            with contextlib.suppress(NoSuchEntry, StaleInode):
                await volume.read_body((await volume.lookup(rng.choice(directories), entry.name)).ino)


async def run(seed: int, rounds: int, *, mounts: int, outages: bool) -> float:
    """One schedule; the checker and the counters afterwards. How many turns were taken."""
    base = MemoryStore()
    await make_volume(base)
    async with AsyncExitStack() as stack:
        hooks = [Network(100 * seed + number, outages=outages) for number in range(mounts)]
        volumes = [await stack.enter_async_context(mounted(base.another(hook))) for hook in hooks]
        shared = (await volumes[0].mkdir(ROOT_INO, b"shared", 0o755, ME)).ino
        own = [(await volume.mkdir(ROOT_INO, b"%d" % at, 0o755, ME)).ino for at, volume in enumerate(volumes)]
        async with trio.open_nursery() as readers:
            for at, volume in enumerate(volumes):
                readers.start_soon(noise, random.Random(seed + at), volume, [own[at], own[at], shared])
            async with trio.open_nursery() as nursery:
                for number in range(2 * mounts):
                    rng = random.Random(1000 * seed + number)
                    worker = Worker(rng, number, volumes, [shared, own[number % mounts], own[number % mounts]])
                    nursery.start_soon(worker.run, rounds)
            readers.cancel_scope.cancel()
        ahead = sum(volume.statistics()["write_back"]["operations"] for volume in volumes)
        asked = sum(volume.statistics()["delegations"]["shared"] for volume in volumes)
        turns = sum(volume.statistics()["delegations"]["turns"] for volume in volumes)
        assert outages or not any(volume.delegations.turns.missed for volume in volumes)
        assert [volume.losses for volume in volumes] == [0] * mounts
    await assert_sound(base)
    assert ahead, "nothing was answered ahead of the store"
    assert asked, "nothing was shared"
    return turns


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mounts", [2, 3])
async def test_what_was_answered_is_seen_everywhere(
    seed: int, mounts: int, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    with trio.fail_after(100_000):
        await run(seed, 30, mounts=mounts, outages=False)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("outages", [False, True])
async def test_and_while_mounts_take_turns(
    seed: int, outages: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """As above, with mounts that take turns wherever two have changed a directory."""
    del autojump_clock
    monkeypatch.setattr("apollofs.metadata.rivals.CHANGES_BEFORE", 1)
    monkeypatch.setattr("apollofs.metadata.rivals.CHANGES_TO_JOIN", 1)
    monkeypatch.setattr("apollofs.metadata.rivals.RECENT_S", 5.0)
    with trio.fail_after(100_000):
        turns = await run(seed, 30, mounts=3, outages=outages)
    assert turns, "nobody took a turn"


@pytest.mark.parametrize("seed", range(4))
async def test_and_while_transactions_fail(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    with trio.fail_after(100_000):
        await run(seed, 30, mounts=2, outages=True)


# -- the end of the queue ----------------------------------------------------------------------------------------------


class Stop:
    """A hook that lets some transactions with names through, and holds the others back."""

    def __init__(self) -> None:
        self.left = 1_000_000
        self.go = trio.Event()

    async def __call__(self, moment: Moment, request: Request) -> None:
        if request.method != "txn" or moment is Moment.AFTER:
            return
        _, then, _ = request.arguments
        assert isinstance(then, Sequence)
        if any(op.key.startswith(KEYS.dentries) for op in then[1:]):
            self.left -= 1
            if self.left < 0:
                await self.go.wait()


async def listed(volume: Volume, directory: int) -> list[bytes]:
    return [entry.name for entry in (await volume.readdir(directory, b"", 1000)).entries]


@pytest.mark.expects_log("are lost with the session", "has lost its lease")
@pytest.mark.parametrize("through", [0, 1, 2])
async def test_a_lost_session_takes_the_end_of_the_queue(through: int) -> None:
    base, stop = MemoryStore(), Stop()
    await make_volume(base)
    async with mounted(base.another(stop)) as a, mounted(base) as b:
        await trio.testing.wait_all_tasks_blocked()
        directory = (await a.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        await a.settle()
        stop.left = through
        names = [b"%03d" % number for number in range(300)]
        for name in names:
            await a.mknod(directory, name, FILE, 0, ME)
        await trio.testing.wait_all_tasks_blocked()
        await base.lease_revoke(a.session.lease_id)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(_hears_of_the_loss, a)
            await trio.testing.wait_all_tasks_blocked()
            stop.go.set()
        assert a.losses == 1
        left = await listed(b, directory)
        assert left == names[: len(left)]
        assert bool(left) == bool(through)
        await a.settle()
        stop.left = 1_000_000
    await assert_sound(base)


async def _hears_of_the_loss(volume: Volume) -> None:
    with pytest.raises(SessionLost):
        await volume.settle()


async def test_who_finds_the_queue_full_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollofs.metadata.ahead.QUEUED_MAX", 8)
    base, stop = MemoryStore(), Stop()
    await make_volume(base)
    async with mounted(base.another(stop)) as a, mounted(base) as b:
        await trio.testing.wait_all_tasks_blocked()
        directory = (await a.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        await a.settle()
        stop.left = 0
        answered: list[int] = []

        async def create() -> None:
            for number in range(20):
                await a.mknod(directory, b"%02d" % number, FILE, 0, ME)
                answered.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked()
            assert answered == list(range(8))
            stop.left = 1_000_000
            stop.go.set()
        assert await listed(b, directory) == [b"%02d" % number for number in range(20)]
    await assert_sound(base)


async def test_the_end_of_a_mount_commits_what_is_queued() -> None:
    base, stop = MemoryStore(), Stop()
    await make_volume(base)
    async with mounted(base) as b:
        async with mounted(base.another(stop)) as a:
            await trio.testing.wait_all_tasks_blocked()
            directory = (await a.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
            await a.settle()
            stop.left = 0
            for number in range(300):
                await a.mknod(directory, b"%03d" % number, FILE, 0, ME)
            await trio.testing.wait_all_tasks_blocked()
            stop.left = 1_000_000
            stop.go.set()
        assert len(await listed(b, directory)) == 300
    await assert_sound(base)


@pytest.mark.expects_log("can't be committed yet")
async def test_a_store_that_is_away_for_long_is_not_outrun(autojump_clock: trio.testing.MockClock) -> None:
    """After a while nothing more is answered ahead; what was is committed when the store is back."""
    del autojump_clock
    base, stop = MemoryStore(), Stop()
    await make_volume(base)
    async with mounted(base.another(stop)) as a, mounted(base) as b:
        await trio.testing.wait_all_tasks_blocked()
        directory = (await a.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        await a.settle()
        stop.left = 0
        await a.mknod(directory, b"1", FILE, 0, ME)
        await trio.sleep(31)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.mknod, directory, b"2", FILE, 0, ME)
            await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks, "it waits for the store"
            stop.left = 1_000_000
            stop.go.set()
        assert await listed(b, directory) == [b"1", b"2"]
    await assert_sound(base)
