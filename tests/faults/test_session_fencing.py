"""A session whose lease has ended changes nothing; the volume opens a new one by itself and goes on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from apollofs.metadata.errors import SessionLost
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import ROOT_INO, BodyChange
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Delete, Range, Store
from apollofs.metadata.volume import Volume
from tests.faults.hooked_store import HookedStore, no_hook
from tests.faults.operations import (
    FILE,
    KEYS,
    WAIT_S,
    assert_sound_after_a_crash,
    contents,
    furnish,
    mutations,
    until_reopened,
)
from tests.support.etcd_server import EtcdCluster
from tests.support.volumes import ME, make_volume, mounted

pytestmark = [
    pytest.mark.faults,
    pytest.mark.expects_log(r"has lost its lease"),
]
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=10, slots=8)
THROUGH = replace(OPTIONS, write_back=False)
MUTATIONS = mutations()
every_mutation = pytest.mark.parametrize("name", list(MUTATIONS))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> object:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(params=["memory", "etcd"])
async def raw(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """An empty store."""
    if request.param == "memory":
        yield MemoryStore()
        return
    cluster: EtcdCluster = request.getfixturevalue("cluster")
    store = EtcdStore(EtcdConfig(cluster.endpoints))
    try:
        await _empty(store)
        yield store
    finally:
        await store.aclose()


async def _empty(store: Store) -> None:
    await store.txn((), (Delete(KEYS.prefix, KEYS.end),))


class Parking:
    """A hook that holds back the opening of a new session until `go`, and transactions until `commits`."""

    def __init__(self) -> None:
        self.go = trio.Event()
        self.go.set()
        self.commits = trio.Event()
        self.commits.set()

    def hold(self) -> None:
        self.go = trio.Event()

    def hold_commits(self) -> None:
        self.commits = trio.Event()

    async def __call__(self, moment: Moment, request: Request) -> None:
        if moment is not Moment.BEFORE:
            return
        if request.method == "range" and request.arguments == (Range(KEYS.superblock),):
            await self.go.wait()
        if request.method == "txn":
            await self.commits.wait()


@contextlib.asynccontextmanager
async def fenced(raw: Store, options: SessionOptions = THROUGH) -> AsyncIterator[tuple[Volume, Parking, HookedStore]]:
    parking = Parking()
    store = HookedStore(raw, parking)
    await make_volume(raw)
    async with mounted(store, options) as volume:
        yield volume, parking, store
        parking.go.set()
        store.hook = no_hook
    await assert_sound_after_a_crash(raw)


@every_mutation
async def test_a_lost_session_changes_nothing_and_the_next_one_serves(name: str, raw: Store) -> None:
    _, mutate = MUTATIONS[name]
    async with fenced(raw) as (volume, parking, _):
        places = await furnish(volume)
        lost = volume.session
        parking.hold()
        await raw.lease_revoke(lost.lease_id)
        before = await contents(raw)
        with pytest.raises(SessionLost):
            await mutate(volume, places)
        assert await contents(raw) == before
        assert not lost.alive
        parking.go.set()
        await until_reopened(volume, lost.number)
        assert volume.session.number > lost.number
        await mutate(volume, places)


async def test_a_hundred_operations_under_way_when_the_lease_ends(raw: Store) -> None:
    """Each has been done before the lease's end, or has failed and changed nothing."""
    async with fenced(raw) as (volume, parking, _):
        lost = volume.session
        reported: dict[bytes, bool] = {}

        async def create(name: bytes) -> None:
            try:
                await volume.mknod(ROOT_INO, name, FILE, 0, ME)
                reported[name] = True
            except SessionLost:
                reported[name] = False

        parking.hold()
        with trio.fail_after(WAIT_S):
            async with trio.open_nursery() as nursery:
                for number in range(100):
                    nursery.start_soon(create, b"%d" % number)
                nursery.start_soon(raw.lease_revoke, lost.lease_id)
        parking.go.set()
        await until_reopened(volume, lost.number)
        there = {entry.name for entry in (await volume.readdir(ROOT_INO, b"", 1000)).entries}
        assert there == {name for name, done in reported.items() if done}
        assert len(reported) == 100


async def test_hooks_and_new_numbers(raw: Store) -> None:
    """Who holds uncommitted writes is told, once; numbers of inodes and blobs never come twice."""
    async with fenced(raw) as (volume, _, _):
        told: list[int] = []
        volume.session_lost_hooks.append(lambda: told.append(1))
        first, blob = volume.session.number, volume.new_blob()
        old = await volume.mknod(ROOT_INO, b"old", FILE, 0, ME)
        await raw.lease_revoke(volume.session.lease_id)
        with contextlib.suppress(SessionLost):
            await volume.mknod(ROOT_INO, b"between", FILE, 0, ME)
        await until_reopened(volume, first)
        assert told == [1]
        assert volume.new_blob() != blob
        new = await volume.mknod(ROOT_INO, b"new", FILE, 0, ME)
        assert new.ino != old.ino
        assert (await volume.lookup(ROOT_INO, b"old")).ino == old.ino


async def test_what_was_prepared_in_the_lost_session_is_refused(raw: Store) -> None:
    async with fenced(raw) as (volume, _, _):
        places = await furnish(volume)
        lost = volume.session
        await raw.lease_revoke(lost.lease_id)
        with pytest.raises(SessionLost):
            await volume.mknod(ROOT_INO, b"x", FILE, 0, ME)
        await until_reopened(volume, lost.number)
        with pytest.raises(SessionLost):
            await volume.commit_body(places.file, BodyChange(0, 4, inline=b"text"), lost)
        assert (await volume.read_body(places.file)).inline == b""


@pytest.mark.expects_log(r"operations that had been answered are lost")
async def test_what_was_answered_ahead_of_the_store_is_lost_with_the_session_and_reported(raw: Store) -> None:
    async with fenced(raw, OPTIONS) as (volume, parking, _):
        await wait_all_tasks_blocked()
        made = await volume.mkdir(ROOT_INO, b"made", 0o755, ME)
        await volume.mknod(made.ino, b"kept", FILE, 0, ME)
        await volume.settle()
        lost = volume.session
        parking.hold()
        parking.hold_commits()
        for name in (b"a", b"b", b"c"):
            await volume.mknod(made.ino, name, FILE, 0, ME)
        await raw.lease_revoke(lost.lease_id)
        before = await contents(raw)
        parking.commits.set()
        with pytest.raises(SessionLost):
            await volume.settle()
        assert volume.losses == 1
        assert await contents(raw) == before
        parking.go.set()
        await until_reopened(volume, lost.number)
        await volume.settle()
        names = [entry.name for entry in (await volume.readdir(made.ino, b"", 10)).entries]
        assert names == [b"kept"]
