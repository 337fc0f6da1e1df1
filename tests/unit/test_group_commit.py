"""Group commit: many operations at once cost few requests, each hears its own outcome, and nothing happens twice."""

from __future__ import annotations

import random
import stat
from collections import Counter

import pytest
import trio
import trio.testing

from apollofs.metadata.counting import CountingStore
from apollofs.metadata.errors import DeadlineExceeded, EntryExists, NoSuchEntry, OutcomeUnknown
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import ROOT_INO, SetAttr
from tests.support.volumes import ME, assert_sound, make_volume, mounted

FILE = stat.S_IFREG | 0o644
WRITERS, FILES = 16, 20


class Network:
    """A hook: every request takes some virtual milliseconds, and some replies are lost."""

    def __init__(self, seed: int, lost: float = 0.0, takes_s: float = 0.001) -> None:
        self._random = random.Random(seed)
        self._lost = lost
        self._takes_s = takes_s
        self.slept_s = 0.0

    async def __call__(self, moment: Moment, request: Request) -> None:
        await trio.sleep(self._takes_s)
        self.slept_s += self._takes_s
        if moment is Moment.AFTER and request.method == "txn" and self._random.random() < self._lost:
            raise OutcomeUnknown("the reply was lost by the test")


async def test_many_at_once_cost_few_requests(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    store = CountingStore(base.another(Network(1)))
    async with mounted(store) as volume:
        directory = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        store.reset()
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(volume.mknod, directory.ino, b"%d" % number, FILE, 0, ME)
        assert store.requests < 20
        listed = await volume.readdir(directory.ino, b"", 1000)
        assert len(listed.entries) == 200
        async with mounted(base) as other:
            assert (await other.getattr(directory.ino)) == (await volume.getattr(directory.ino))
    await assert_sound(base)


async def test_who_comes_back_from_a_batch_goes_out_in_one(autojump_clock: trio.testing.MockClock) -> None:
    """Not one alone, while the others wait a whole round trip for it; and a mount with one writer waits for nobody."""
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    network = Network(1, takes_s=0.05)
    store = CountingStore(base.another(network))
    async with mounted(store) as volume:
        made = [(await volume.mkdir(ROOT_INO, b"d%d" % number, 0o755, ME)).ino for number in range(WRITERS)]

        async def write(directory: int, files: int) -> None:
            for number in range(files):
                await volume.mknod(directory, b"%d.%d" % (files, number), FILE, 0, ME)
                await trio.sleep(0.0003)

        store.reset()
        async with trio.open_nursery() as nursery:
            for directory in made:
                nursery.start_soon(write, directory, FILES)
        assert store.requests < WRITERS * FILES / 6
        await write(made[0], 5)
        network.slept_s = 0.0
        began = trio.current_time()
        await volume.mknod(made[0], b"alone", FILE, 0, ME)
        assert trio.current_time() - began == pytest.approx(network.slept_s)
    await assert_sound(base)


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
async def test_each_hears_its_own_outcome(seed: int, lost: float, autojump_clock: trio.testing.MockClock) -> None:
    """Sixteen tasks on two mounts create, rename, chmod and unlink the same few names at once."""
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    balance: Counter[bytes] = Counter()
    async with (
        mounted(base.another(Network(seed, lost))) as a,
        mounted(base.another(Network(seed + 100, lost))) as b,
    ):
        directory = (await a.mkdir(ROOT_INO, b"d", 0o755, ME)).ino

        async def work(number: int) -> None:
            rng = random.Random(1000 * seed + number)
            volume = (a, b)[number % 2]
            for _ in range(25):
                name = b"%d" % rng.randrange(6)
                try:
                    match rng.randrange(4):
                        case 0:
                            await volume.mknod(directory, name, FILE, 0, ME)
                            balance[name] += 1
                        case 1:
                            await volume.unlink(directory, name)
                            balance[name] -= 1
                        case 2:
                            inode = await volume.lookup(directory, name)
                            await volume.setattr(inode.ino, SetAttr(uid=number))
                        case _:
                            fresh = b"%s-%d-%d" % (name, number, rng.randrange(1 << 30))
                            await volume.rename(directory, name, directory, fresh)
                            balance[name] -= 1
                            balance[fresh] += 1
                except (EntryExists, NoSuchEntry):
                    continue
                except Exception as exc:
                    if type(exc).__name__ != "StaleInode":
                        raise

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(work, number)
        names = {entry.name for entry in (await b.readdir(directory, b"", 10_000)).entries}
        assert names == {name for name, count in balance.items() if count}
        assert set(balance.values()) <= {0, 1}, "an operation happened twice, or failed after it had happened"
    await assert_sound(base)


async def test_a_batch_in_doubt_ends_all_its_members(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    base = MemoryStore()
    await make_volume(base)
    network = Network(1)
    errors = 0
    async with mounted(base.another(network)) as volume:
        directory = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        network._lost = 1.0

        async def make(number: int) -> None:
            nonlocal errors
            with pytest.raises(DeadlineExceeded):
                await volume.mknod(directory.ino, b"%d" % number, FILE, 0, ME)
            errors += 1

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(make, number)
        network._lost = 0.0
        assert errors == 20
        await volume.mknod(directory.ino, b"after", FILE, 0, ME)
        async with mounted(base) as other:
            ours = {entry.name for entry in (await volume.readdir(directory.ino, b"", 100)).entries}
            assert ours == {entry.name for entry in (await other.readdir(directory.ino, b"", 100)).entries}
    await assert_sound(base)
