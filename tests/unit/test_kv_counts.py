"""How many requests values cost: not one more than docs/KV.md says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

import pytest
from trio.testing import wait_all_tasks_blocked

from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.kv import Client, KeyValues
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.errors import NoSuchEntry, RevisionConflict
from apollofs.metadata.memory import MemoryStore
from tests.support.bodies import BrokenBlobs
from tests.support.values import CLIENT, kv_client
from tests.support.volumes import assert_sound, make_volume

LARGE = bytes(10_000)


@dataclass
class World:
    store: CountingStore
    client: Client
    kv: KeyValues
    other: KeyValues


@pytest.fixture(params=[False, True], ids=["plain", "delegated"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Two clients, of which the first caches or not."""
    store, blobs = CountingStore(MemoryStore()), BrokenBlobs(MemoryBlobs())
    await make_volume(store)
    plain = replace(CLIENT, delegations=False)
    options = replace(plain, delegations=request.param)
    async with kv_client(store, blobs, options) as client, kv_client(store, blobs, plain) as other:
        await wait_all_tasks_blocked()  # nothing is delegated until recalls reach us
        yield World(store, client, await client.kv("/d", create=True), await other.kv("/d"))
    await assert_sound(store)


@contextlib.contextmanager
def requests(world: World, expected: int) -> Iterator[None]:
    world.store.reset()
    yield
    assert world.store.requests == expected


async def test_puts(world: World) -> None:
    with requests(world, 1):
        first = await world.kv.put("new", b"1")
    with requests(world, 1):
        await world.kv.put_if("new", b"2", first)
    with requests(world, 1):
        await world.kv.put("new", LARGE)
    with requests(world, 1):
        await world.kv.put("new", b"3")
    with requests(world, 1):
        await world.kv.transaction([world.kv.change(f"k{number}", b"v", revision=0) for number in range(16)])
    with requests(world, 1):
        await world.kv.delete("new")


@pytest.mark.parametrize(("value", "count"), [(b"v" * 200, 1), (b"v" * 300, 1), (LARGE, 1)])
async def test_gets_of_what_others_change(value: bytes, count: int, world: World) -> None:
    """One request, also when the value is another one each time; two for what is too large to be kept with the name,
    and too small for a blob."""
    await world.other.put("k", value)
    await world.kv.get("k")
    for number in range(3):
        await world.other.put("k", value + b"%d" % number)
        with requests(world, count):
            assert (await world.kv.get("k")).data == value + b"%d" % number
    if not world.client._volume.delegations.cache.groups:
        with requests(world, 1):
            assert (await world.kv.get("k")).data == value + b"2"
    with requests(world, 1), pytest.raises(RevisionConflict):
        await world.other.put_if_absent("k", b"")
    with requests(world, 1):
        await world.other.list()


async def test_what_is_delegated_costs_nothing() -> None:
    store, blobs = CountingStore(MemoryStore()), BrokenBlobs(MemoryBlobs())
    await make_volume(store)
    async with kv_client(store, blobs) as client:
        await wait_all_tasks_blocked()
        kv = await client.kv("/d", create=True)
        revision = await kv.put("k", b"value")
        store.reset()
        assert (await kv.get("k")).revision == revision
        with pytest.raises(NoSuchEntry):
            await kv.get("none")
        assert store.requests == 0
