"""Where a value is that has replaced another one: under that one's number, whatever becomes of the file after that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.kv import KeyValues
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, BodyChange, RenameFlag, SetAttr
from apollofs.metadata.store import Range, prefix_end
from apollofs.metadata.volume import Volume
from tests.support.bodies import BrokenBlobs
from tests.support.collecting import collect
from tests.support.values import CLIENT, kv_client
from tests.support.volumes import ME, OPTIONS, VOLUME, assert_sound, make_volume, mounted

KEYS = Keys(VOLUME)
FIRST, SECOND, THIRD = b"1" * 300, b"2" * 1000, b"3" * 700
PLAIN = replace(CLIENT, delegations=False)


@dataclass
class World:
    """`kv` and `other`: clients; `mount`: a mount's volume, which asks the store each time."""

    store: CountingStore
    blobs: BrokenBlobs
    kv: KeyValues
    other: KeyValues
    mount: Volume

    async def ino(self, name: bytes = b"k") -> int:
        return (await self.mount.lookup(ROOT_INO, name)).ino

    async def bodies(self) -> int:
        """How many inline bodies the store has."""
        prefix = KEYS.table(b"v")
        return (await self.store.range(Range(prefix, prefix_end(prefix)))).count

    async def read(self, name: bytes = b"k") -> bytes:
        """As all see it."""
        found = {(await kv.get(name)).data for kv in (self.kv, self.other)}
        body = await self.mount.read_body(await self.ino(name))
        found.add(body.inline.ljust(body.inode.size_bytes, b"\0"))
        (value,) = found
        return value


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A value that was replaced twice."""
    store, blobs = CountingStore(MemoryStore()), BrokenBlobs(MemoryBlobs())
    await make_volume(store)
    async with (
        kv_client(store, blobs) as cached,
        kv_client(store, blobs, PLAIN) as plain,
        mounted(store, replace(OPTIONS, delegations=False, write_back=False)) as mount,
    ):
        made = World(store, blobs, await plain.kv("/"), await cached.kv("/"), mount)
        for kv, value in ((made.kv, FIRST), (made.other, SECOND), (made.kv, THIRD)):
            await kv.put("k", value)
            assert await made.read() == value
        assert await made.bodies() == 1
        yield made
    await assert_sound(store)


async def test_a_mount_reads_it_in_one_request(world: World) -> None:
    ino = await world.ino()
    await world.other.put("k", SECOND)
    ino = await world.ino()
    world.store.reset()
    assert (await world.mount.read_body(ino)).inline == SECOND
    assert world.store.requests == 1


async def test_a_mount_that_knows_the_number_only(world: World) -> None:
    ino = await world.ino()
    entry = (await world.mount.readdir(ROOT_INO, b"", 10)).entries[0]
    async with mounted(world.store, replace(OPTIONS, delegations=False)) as other:
        other.remember(ino, ROOT_INO, entry.name)
        assert (await other.read_body(ino)).inline == THIRD


async def shrink(world: World) -> bytes:
    await world.mount.setattr(await world.ino(), SetAttr(size_bytes=400))
    return THIRD[:400]


async def grow(world: World) -> bytes:
    await world.mount.setattr(await world.ino(), SetAttr(size_bytes=900))
    return THIRD.ljust(900, b"\0")


async def write(world: World) -> bytes:
    ino = await world.ino()
    version = (await world.mount.getattr(ino)).body_version
    await world.mount.commit_body(ino, BodyChange(version, 1200, inline=b"w" * 1200))
    return b"w" * 1200


async def rename(world: World) -> bytes:
    await world.mount.rename(ROOT_INO, b"k", ROOT_INO, b"elsewhere")
    assert await world.read(b"elsewhere") == THIRD
    await world.kv.put("k", SECOND)
    assert await world.read(b"elsewhere") == THIRD
    await world.mount.rename(ROOT_INO, b"elsewhere", ROOT_INO, b"k", RenameFlag.EXCHANGE)
    assert await world.read(b"elsewhere") == SECOND
    await world.kv.delete("elsewhere")
    return THIRD


async def link(world: World) -> bytes:
    await world.mount.link(await world.ino(), ROOT_INO, b"also")
    assert await world.read(b"also") == await world.read() == THIRD
    await world.kv.put("also", SECOND)
    assert await world.read(b"also") == SECOND
    await world.kv.delete("also")
    return THIRD


async def restore(world: World) -> bytes:
    await world.mount.unlink(ROOT_INO, b"k")
    await world.kv.put("k", SECOND)
    await world.kv.delete("k")
    prefix = KEYS.table(b"g")
    buried = (await world.store.range(Range(prefix, prefix_end(prefix)))).kvs
    await world.mount.restore(buried[0].key, ROOT_INO, b"k")
    return THIRD


async def put_little(world: World) -> bytes:
    await world.other.put("k", b"little")
    return b"little"


@pytest.mark.parametrize("happens", [shrink, grow, write, rename, link, restore, put_little])
async def test_it_stays_whole(world: World, happens: Callable[[World], Awaitable[bytes]]) -> None:
    value = await happens(world)
    assert await world.read() == value
    for value in (SECOND, FIRST):
        await world.other.put("k", value)
        assert await world.read() == value


@pytest.mark.parametrize("value", [b"", bytes(5000)], ids=["empty", "large"])
async def test_what_is_not_kept_so_leaves_nothing(world: World, value: bytes) -> None:
    await world.kv.put("k", value)
    assert (await world.other.get("k")).data == value
    assert await world.bodies() == 0
    await world.kv.put("k", FIRST)
    assert await world.read() == FIRST
    assert await world.bodies() == 1


async def test_as_it_was(world: World) -> None:
    revision = (await world.kv.get("k")).revision
    await world.other.put("k", SECOND)
    assert (await world.kv.get("k", revision=revision)).data == THIRD


async def test_the_collector_takes_it_away(world: World) -> None:
    await world.kv.delete("k")
    assert await world.bodies() == 1
    await collect(world.store, world.blobs)
    assert await world.bodies() == 0


async def test_a_blob_through_a_mount_takes_it_away(world: World) -> None:
    ino = await world.ino()
    version = (await world.mount.getattr(ino)).body_version
    await world.mount.commit_body(ino, BodyChange(version, 0, rewrites_all=True, lifts_inline=True))
    assert await world.bodies() == 0
    assert (await world.mount.mknod(ROOT_INO, b"other", 0o100644, 0, ME)).is_file
