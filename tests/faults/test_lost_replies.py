"""A proxy that swallows replies after etcd has applied the request: 500 of each kind, each done once, and success."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from apollofs.metadata import journal
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.journal import Kind
from apollofs.metadata.records import ROOT_INO, Inode
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Compare, Op, Put, Range, Store, TxnResult
from apollofs.metadata.volume import Volume
from tests.faults.hooked_store import HookedStore
from tests.faults.operations import FILE, KEYS, changes
from tests.support.etcd_server import EtcdCluster
from tests.support.tcp_proxy import TcpProxy
from tests.support.volumes import ME, assert_sound, make_volume, mounted

pytestmark = [pytest.mark.faults, pytest.mark.slow]
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=30, slots=32)
LOST = 500
AT_ONCE = 2
"""So few that each goes alone; batches that lose their reply are in tests/unit/test_group_commit.py."""
ROUNDS_MAX = 600
Step = Callable[[Volume, int], Awaitable[object]]


class Losses(HookedStore):
    """Remembers which transactions of a session had an unknown outcome."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.lost: set[bytes] = set()
        """Slot records: each names one transaction, and the operations that it holds."""

    @property
    def operations(self) -> int:
        """How many operations were in those transactions."""
        return sum(len(journal.decode(record).changes) for record in self.lost)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """See the port."""
        try:
            return await super().txn(compares, then, orelse)
        except OutcomeUnknown:
            if then and isinstance(then[0], Put) and then[0].key.startswith(KEYS.slots):
                self.lost.add(then[0].value)
            raise


class World:
    """A volume behind a proxy, and the way around the proxy."""

    def __init__(self, volume: Volume, losses: Losses, raw: Store, proxy: TcpProxy) -> None:
        self.volume = volume
        self.losses = losses
        self.raw = raw
        self.proxy = proxy
        self.done = 0

    async def lose_replies(self, step: Step) -> int:
        """Run `step` on 0, 1, 2..., until `LOST` of them had their reply swallowed. Returns how many ran; all of them
        have reported success."""
        self.losses.lost.clear()
        count = 0
        for _ in range(ROUNDS_MAX):
            self.proxy.swallow_replies(1)
            async with trio.open_nursery() as nursery:
                for number in range(count, count + AT_ONCE):
                    nursery.start_soon(step, self.volume, number)
            count += AT_ONCE
            if self.losses.operations >= LOST:
                break
        assert self.losses.operations >= LOST
        self.proxy.swallow_replies(0)
        return count

    async def revision(self) -> int:
        return (await self.raw.range(Range(KEYS.superblock))).revision


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster.started(tmp_path / "etcd") as cluster:
        yield cluster


@pytest.fixture
async def world(cluster: EtcdCluster) -> AsyncIterator[World]:
    with TcpProxy.started(cluster.server.endpoint) as proxy:
        async with opened(cluster.endpoints) as raw, opened((proxy.endpoint,)) as behind:
            await make_volume(raw)
            losses = Losses(behind)
            async with mounted(losses, OPTIONS) as volume:
                yield World(volume, losses, raw, proxy)
            await assert_sound(raw)


@contextlib.asynccontextmanager
async def opened(endpoints: tuple[tuple[str, int], ...]) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(EtcdConfig(endpoints))
    try:
        yield store
    finally:
        await store.aclose()


async def create(volume: Volume, number: int) -> Inode:
    return await volume.mknod(ROOT_INO, b"f%d" % number, FILE, 0, ME)


async def make_directory(volume: Volume, number: int) -> Inode:
    return await volume.mkdir(ROOT_INO, b"d%d" % number, 0o755, ME)


async def rename(volume: Volume, number: int) -> object:
    return await volume.rename(ROOT_INO, b"f%d" % number, ROOT_INO, b"r%d" % number)


async def unlink(volume: Volume, number: int) -> Inode:
    return await volume.unlink(ROOT_INO, b"f%d" % number)


async def names_by_journal(world: World, since: int, kind: Kind) -> list[bytes]:
    return sorted(change.name for change in await changes(world.raw, since) if change.kind is kind)


async def there(world: World) -> set[bytes]:
    found: set[bytes] = set()
    after, more = b"", True
    while more:
        page = await world.volume.readdir(ROOT_INO, after, 1000)
        found |= {entry.name for entry in page.entries}
        more, after = page.more, page.entries[-1].name if page.entries else b""
    return found


@pytest.mark.parametrize(("step", "kind", "letter"), [(create, Kind.CREATE, "f"), (make_directory, Kind.MKDIR, "d")])
async def test_lost_replies_of_what_makes(world: World, step: Step, kind: Kind, letter: str) -> None:
    since = await world.revision() + 1  # the root was made before
    count = await world.lose_replies(step)
    wanted = sorted(f"{letter}{number}".encode() for number in range(count))
    assert await names_by_journal(world, since, kind) == wanted
    assert await there(world) == set(wanted)


async def test_lost_replies_of_renames(world: World) -> None:
    made = await _make(world, LOST + 20 * AT_ONCE)
    since = await world.revision() + 1
    count = await world.lose_replies(rename)
    assert count <= made
    wanted = sorted(b"r%d" % number for number in range(count))
    assert await names_by_journal(world, since, Kind.RENAME) == wanted
    assert await there(world) == {*wanted, *(b"f%d" % number for number in range(count, made))}


async def test_lost_replies_of_unlinks(world: World) -> None:
    made = await _make(world, LOST + 20 * AT_ONCE)
    since = await world.revision() + 1
    count = await world.lose_replies(unlink)
    assert count <= made
    assert await names_by_journal(world, since, Kind.UNLINK) == sorted(b"f%d" % number for number in range(count))
    assert await there(world) == {b"f%d" % number for number in range(count, made)}


async def _make(world: World, count: int) -> int:
    limit = trio.CapacityLimiter(OPTIONS.slots)

    async def one(number: int) -> None:
        async with limit:
            await create(world.volume, number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
    return count


async def test_etcd_killed_and_started_amid_work(world: World, cluster: EtcdCluster) -> None:
    """Every operation that was under way is done once, and reported done; the session lives on."""
    session = world.volume.session.number
    at_least, rounds = trio.Event(), 3
    finished = 0

    async def work(worker: int) -> None:
        nonlocal finished, at_least
        for number in range(40):
            await create(world.volume, worker * 1000 + number)
            finished += 1
            at_least.set()

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for worker in range(16):
                nursery.start_soon(work, worker)
            for _ in range(rounds):
                at_least = trio.Event()
                await at_least.wait()
                await trio.to_thread.run_sync(cluster.server.kill)
                await trio.to_thread.run_sync(cluster.server.start)
    assert finished == 16 * 40
    wanted = sorted(b"f%d" % (worker * 1000 + number) for worker in range(16) for number in range(40))
    assert await names_by_journal(world, 1, Kind.CREATE) == wanted
    assert await there(world) == set(wanted)
    assert world.volume.session.number == session
