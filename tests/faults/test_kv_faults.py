"""Values amid lost replies, lost sessions, broken connections and compaction, on a real etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import pytest
import trio

from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.kv import Client, KeyEvent, KeyValues, KeyWatch
from apollofs.metadata.errors import Compacted, OutcomeUnknown, RevisionConflict, SessionLost
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.journal import Kind
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.store import Delete, Put
from tests.faults.hooked_store import HookedStore, no_hook
from tests.faults.operations import KEYS, assert_sound_after_a_crash, changes, counted
from tests.support.bodies import BrokenBlobs
from tests.support.etcd_server import EtcdCluster
from tests.support.tcp_proxy import TcpProxy
from tests.support.values import CLIENT, kv_client
from tests.support.volumes import make_volume

pytestmark = pytest.mark.faults
LARGE = bytes(range(256)) * 300
BOUND_S = 120
STEPS = 300
WRITERS = 8
OPTIONS = replace(CLIENT, lease_ttl_s=60, operation_deadline_s=30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> object:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@dataclass
class World:
    """A volume with two clients: one behind a proxy, and with a hook, one beside it."""

    raw: EtcdStore
    hooked: HookedStore
    proxy: TcpProxy
    blobs: BrokenBlobs
    client: Client
    kv: KeyValues
    near: KeyValues


@pytest.fixture
async def world(cluster: EtcdCluster) -> AsyncIterator[World]:
    with trio.fail_after(BOUND_S), TcpProxy.started(cluster.server.endpoint) as proxy:
        raw, far = EtcdStore(EtcdConfig(cluster.endpoints)), EtcdStore(EtcdConfig((proxy.endpoint,)))
        await raw.txn((), (Delete(KEYS.prefix, KEYS.end),))
        await make_volume(raw)
        blobs, hooked = BrokenBlobs(MemoryBlobs()), HookedStore(far)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(far.aclose)
            stack.push_async_callback(raw.aclose)
            stack.push_async_callback(assert_sound_after_a_crash, raw)
            client = await stack.enter_async_context(kv_client(hooked, blobs, OPTIONS))
            beside = await stack.enter_async_context(kv_client(raw, blobs, OPTIONS))
            yield World(raw, hooked, proxy, blobs, client, await client.kv("/"), await beside.kv("/"))


def is_write(request: Request) -> bool:
    """Whether it is a transaction of a session."""
    match request:
        case Request("txn", (_, (Put(key), *_), _)):
            return key.startswith(KEYS.slots)
    return False


async def count_up(kv: KeyValues, times: int) -> None:
    """By compare-and-put, whoever else does so too."""
    for _ in range(times):
        while True:
            found = await kv.get("count")
            try:
                await kv.put_if("count", b"%d" % (int(found.data) + 1), found.revision)
                break
            except RevisionConflict:
                pass


async def test_puts_whose_reply_is_lost_happen_once_and_succeed(world: World) -> None:
    since = await world.near.put("count", b"0") + 1
    lost = 0

    async def lose(moment: Moment, request: Request) -> None:
        nonlocal lost
        if moment is Moment.AFTER and is_write(request) and lost < 15:
            lost += 1
            raise OutcomeUnknown("the reply is lost")

    world.hooked.hook = lose
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_up, world.kv, 40)
        nursery.start_soon(count_up, world.near, 40)
    assert lost == 15
    assert (await world.near.get("count")).data == b"80"
    assert counted(await changes(world.raw, since))[Kind.COMMIT] == 80


async def test_exact_counts_while_connections_break(world: World) -> None:
    await world.near.put("count", b"0")
    finished = trio.Event()

    async def disturb() -> None:
        while not finished.is_set():
            world.proxy.drop_connections()
            with trio.move_on_after(0.1):
                await finished.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(disturb)
        async with trio.open_nursery() as writers:
            for writer in range(WRITERS):
                writers.start_soon(count_up, world.kv if writer % 2 else world.near, 25)
        finished.set()
    assert (await world.kv.get("count")).data == b"200"


@pytest.mark.expects_log("has lost its lease")
async def test_a_put_in_a_session_that_is_lost_is_made_in_the_next(world: World) -> None:
    """Its upload too: what an ended session stored may be collected."""
    session = world.client._volume.session
    lost = trio.Event()

    async def lose() -> None:
        if not lost.is_set():
            lost.set()
            await world.raw.lease_revoke(session.lease_id)

    world.blobs.before_put = lose
    async with world.near.watch() as events:
        revision = await world.kv.put("f", LARGE)
        assert [await anext(events)] == [KeyEvent("f", revision, False, len(LARGE))]
    assert (await world.near.get("f")).data == LARGE
    numbers = {int(name.split("/")[1], 16) >> 32 & 0xFFFFFF for name in world.blobs.puts}
    assert numbers == {session.number, world.client._volume.session.number}
    assert len(numbers) == 2


@pytest.mark.expects_log("has lost its lease")
async def test_a_put_that_may_have_been_made_is_not_made_again(world: World) -> None:
    session = world.client._volume.session
    since = (await world.near.list()).revision + 1

    async def lose(moment: Moment, request: Request) -> None:
        if moment is Moment.AFTER and is_write(request):
            world.hooked.hook = no_hook
            await world.raw.lease_revoke(session.lease_id)
            raise OutcomeUnknown("the reply is lost, and then the session")

    world.hooked.hook = lose
    with pytest.raises(SessionLost) as told:
        await world.kv.put("f", b"once")
    assert told.value.in_doubt
    assert counted(await changes(world.raw, since))[Kind.CREATE] == 1


# -- watching ----------------------------------------------------------------------------------------------------------


async def write(kv: KeyValues, revisions: list[tuple[str, int, bool]]) -> None:
    """Puts, removals and transactions; what a watch must tell, in order."""
    for number in range(STEPS):
        key = f"k{number % 7}"
        if number % 5 == 4:
            revision = await kv.put(key, b"%d" % number)
            await kv.delete(key)
            revisions.append((key, revision, False))
            revisions.append((key, 0, True))
        elif number % 5 == 3:
            revision = await kv.transaction([kv.change("k8", b"a"), kv.change("k9", b"b"), kv.change("other", b"c")])
            revisions += [("k8", revision, False), ("k9", revision, False)]
        else:
            revisions.append((key, await kv.put(key, b"%d" % number), False))


async def hear(events: KeyWatch, count: int) -> list[KeyEvent]:
    return [await anext(events) for _ in range(count)]


def assert_same(events: list[KeyEvent], written: list[tuple[str, int, bool]]) -> None:
    told = [(event.key, 0 if event.deleted else event.revision, event.deleted) for event in events]
    assert told == written
    revisions = [event.revision for event in events]
    assert revisions == sorted(revisions)


async def test_a_watch_tells_everything_while_connections_break_and_history_is_compacted(world: World) -> None:
    """The history that it has told goes; what is still owed stays, as a compaction by age would leave it."""
    written: list[tuple[str, int, bool]] = []
    finished = trio.Event()
    events: list[KeyEvent] = []

    async def disturb(watch: KeyWatch) -> None:
        while not finished.is_set():
            world.proxy.drop_connections()
            if watch.position > 2:
                try:
                    await world.raw.compact(watch.position - 2)
                except Compacted:
                    pass  # so far it was before
            with trio.move_on_after(0.05):
                await finished.wait()

    async with world.kv.watch("k") as watch, trio.open_nursery() as nursery:
        nursery.start_soon(disturb, watch)

        async def listen() -> None:
            async for event in watch:
                events.append(event)
                if finished.is_set() and len(events) >= len(written):
                    nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        await write(world.near, written)
        finished.set()
        await world.near.put("k-last", b"")
        written.append(("k-last", (await world.near.get("k-last")).revision, False))
    assert_same(events[: len(written)], written)


async def test_a_watch_goes_on_in_another_one(world: World) -> None:
    """From its position, wherever it stopped: at least once, in order, nothing left out."""
    written: list[tuple[str, int, bool]] = []
    start = (await world.near.list()).revision + 1
    await write(world.near, written)
    events: list[KeyEvent] = []
    position = start
    while len(dict.fromkeys(events)) < len(written):
        async with world.kv.watch("k", from_revision=position) as watch:
            events += await hear(watch, min(40, len(written) - len(dict.fromkeys(events))))
            position = watch.position
    assert_same(list(dict.fromkeys(events)), written)


async def test_history_that_is_gone_is_an_error_that_says_where_to_go_on(world: World) -> None:
    first = await world.near.put("k", b"1")
    second = await world.near.put("k", b"2")
    await world.raw.compact(second)
    async with world.kv.watch(from_revision=first) as watch:
        with pytest.raises(Compacted) as gone:
            await anext(watch)
    page = await world.kv.list()
    assert first < gone.value.first_revision <= page.revision + 1
    third = await world.near.put("k", b"3")
    async with world.kv.watch(from_revision=page.revision + 1) as watch:
        assert (await anext(watch)).revision == third


async def test_a_watch_that_was_cut_off_while_its_history_went_says_so(world: World) -> None:
    async with world.kv.watch() as watch:
        world.proxy.blackhole()
        world.proxy.drop_connections()
        world.proxy.refuse()
        for number in range(3):
            last = await world.near.put("k", b"%d" % number)
        await world.raw.compact(last)
        world.proxy.heal()
        with pytest.raises(Compacted):
            await hear(watch, 3)
