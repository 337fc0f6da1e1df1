"""The block cache: one fetch for many readers, nothing unverified handed out, and no error because of its disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable, BlockStore
from apollofs.blobstore.footer import sealed_length
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.blobs import BlobSource, Block
from apollofs.fs.cache import BlockCache
from apollofs.fs.cache_files import CacheFiles
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyUnavailable, CorruptBody, MissingBlob
from apollofs.fs.room import Room
from tests.support.bodies import BrokenBlobs

BLOCK_BYTES = 1000
FULL = OSError(errno.ENOSPC, "full")


class Cached:
    """A cache over a broken store, as often as the test mounts it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = BrokenBlobs(MemoryBlobs())
        self.config = BodyConfig(directory, disk_free_bytes_min=0, downloads_max=4)

    @contextlib.asynccontextmanager
    async def opened(self, bytes_max: int = 0) -> AsyncIterator[BlockCache]:
        async def open_store(site: int) -> BlockStore:
            await trio.lowlevel.checkpoint()
            return self.blobs

        async with trio.open_nursery() as nursery:
            source = BlobSource(open_store, BLOCK_BYTES)
            room = Room(bytes_max or self.config.cache_bytes_max)
            downloads = trio.CapacityLimiter(self.config.downloads_max)
            cache = BlockCache(source, room, downloads, self.config, str(self.directory / "scratch"), nursery)
            await cache.start()
            yield cache
            await trio.testing.wait_all_tasks_blocked()

    async def put(self, index: int) -> Block:
        block = Block(1, index, BLOCK_BYTES)
        await self.blobs.put(block.name, content(block))
        return block

    def files(self) -> list[Path]:
        return sorted(path for path in (self.directory / "blocks").rglob("*") if path.is_file())


def content(block: Block) -> bytes:
    return bytes((block.index * 7 + at) % 251 for at in range(block.length))


@pytest.fixture
def cached(tmp_path: Path) -> Cached:
    return Cached(tmp_path)


async def settled(cache: BlockCache) -> None:
    """Until what was fetched is on disk."""
    while cache._fetches:
        await trio.testing.wait_all_tasks_blocked()


async def test_a_block_is_fetched_once_and_survives_a_remount(cached: Cached) -> None:
    block = await cached.put(0)
    async with cached.opened() as cache:
        assert await cache.read(block, 10, 50) == content(block)[10:60]
        await settled(cache)
        assert await cache.read(block, 0, 1000) == content(block)
    async with cached.opened() as cache:
        assert cache.blocks == 1
        assert cache.bytes_used == sealed_length(BLOCK_BYTES)
        assert await cache.read(block, 999, 1) == content(block)[999:]
    assert len(cached.blobs.reads) == 1


async def test_many_readers_wait_for_one_fetch(cached: Cached) -> None:
    block = await cached.put(0)
    async with cached.opened() as cache, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(cache.read, block, 0, 1000)
    assert len(cached.blobs.reads) == 1


async def test_a_cancelled_reader_leaves_the_others_their_block(cached: Cached) -> None:
    block = await cached.put(0)
    go_on = trio.Event()
    cached.blobs.before_read = go_on.wait
    async with cached.opened() as cache, trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def impatient() -> None:
            with first:
                await cache.read(block, 0, 10)

        nursery.start_soon(impatient)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(cache.read, block, 0, 1000)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert first.cancelled_caught
    assert len(cached.blobs.reads) == 1


async def test_every_waiter_gets_the_error(cached: Cached) -> None:
    missing, corrupt, down = Block(1, 5, 1000), await cached.put(1), await cached.put(2)
    cached.blobs.corrupt(corrupt.name)
    errors: list[Exception] = []

    async def read(block: Block) -> None:
        try:
            await cache.read(block, 0, 1)
        except (BodyUnavailable, CorruptBody) as exc:
            errors.append(exc)

    async with cached.opened() as cache:
        for block, error in ((missing, MissingBlob), (down, BodyUnavailable)):
            if block is down:
                cached.blobs.fail_reads = [BlobStoreUnavailable("down")]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, block)
                nursery.start_soon(read, block)
            assert [type(found) for found in errors] == [error, error]
            assert errors[0] is not errors[1]
            errors.clear()
        assert await cache.read(down, 0, 1000) == content(down)


@pytest.mark.expects_log("read again after corrupt data", "corrupt data in the blob store")
async def test_bad_bytes_of_the_store_are_never_handed_out(cached: Cached) -> None:
    block = await cached.put(0)
    cached.blobs.corrupt(block.name)
    async with cached.opened() as cache:
        with pytest.raises(CorruptBody):
            await cache.read(block, 0, 10)
        with pytest.raises(CorruptBody):
            await cache.read(block, 0, 10, whole=False)
    assert cached.files() == []


def spoil(path: Path, damage: str, other: Path) -> bytes:
    """Damage a file; what it held before."""
    data = path.read_bytes()
    spoilt = {
        "flip": data[:500] + bytes([data[500] ^ 1]) + data[501:],
        "cut": data[:700],
        "empty": b"",
        "footer": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "other": other.read_bytes(),
    }
    path.write_bytes(spoilt[damage])
    return data


@pytest.mark.expects_log("is damaged and is fetched again")
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "footer", "other"])
async def test_a_damaged_cache_file_is_fetched_again(cached: Cached, damage: str) -> None:
    block, other = await cached.put(0), await cached.put(1)
    async with cached.opened() as cache:
        for wanted in (block, other):
            await cache.read(wanted, 0, 1000)
        await settled(cache)
        path = Path(cache._files.path(block))
        data = spoil(path, damage, Path(cache._files.path(other)))
        cache._index._footers.clear()
        assert await cache.read(block, 0, 1000) == content(block)
        await settled(cache)
        assert spoil(path, "cut", path) == data


async def test_least_recently_used_blocks_leave_first(cached: Cached) -> None:
    blocks = [await cached.put(index) for index in range(5)]
    async with cached.opened(bytes_max=3 * sealed_length(BLOCK_BYTES)) as cache:
        for block in (*blocks[:3], blocks[0], blocks[3]):
            await cache.read(block, 0, 1)
            await settled(cache)
        assert [block in cache._index for block in blocks] == [True, False, True, True, False]
        assert cache.bytes_used == 3 * sealed_length(BLOCK_BYTES)
        assert len(cached.files()) == 3
    async with cached.opened(bytes_max=sealed_length(BLOCK_BYTES)) as cache:
        assert len(cached.files()) == cache.blocks == 1


async def test_the_directory_may_be_deleted_at_any_moment(cached: Cached) -> None:
    block = await cached.put(0)
    async with cached.opened() as cache:
        for _ in range(2):
            assert await cache.read(block, 0, 1000) == content(block)
            await settled(cache)
            for path in cached.files():
                path.unlink()
                path.parent.rmdir()
        assert await cache.read(block, 0, 1000) == content(block)
    assert len(cached.files()) == 1


async def test_what_does_not_belong_there_goes_at_the_start(cached: Cached) -> None:
    junk = cached.directory / "blocks" / "ab" / "junk"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"x" * 2000)
    async with cached.opened() as cache:
        assert cache.blocks == 0
    assert not junk.exists()


@pytest.mark.expects_log("the block cache is not used where it should be")
@pytest.mark.parametrize("error", [FULL, OSError(errno.EIO, "broken"), OSError(errno.EROFS, "read-only")])
async def test_a_disk_that_takes_nothing_costs_no_read(
    cached: Cached, error: OSError, monkeypatch: pytest.MonkeyPatch, log_watch: object
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(CacheFiles, "_write_whole", fail)
    blocks = [await cached.put(index) for index in range(3)]
    async with cached.opened() as cache:
        for block in blocks * 2:
            assert await cache.read(block, 0, 1000) == content(block)
            await settled(cache)
        assert cache.bytes_used == 0
        await cache.insert(blocks[0], content(blocks[0]))
    assert len(log_watch.messages()) == 1  # type: ignore[attr-defined]  # not one for each block


@pytest.mark.expects_log("the block cache is not used where it should be")
async def test_a_directory_that_can_not_be_made_costs_no_read(cached: Cached) -> None:
    (cached.directory / "blocks").write_bytes(b"a file in its place")
    block = await cached.put(0)
    async with cached.opened() as cache:
        assert await cache.read(block, 3, 4) == content(block)[3:7]


@pytest.mark.expects_log("there is no room for a block")
async def test_the_disk_keeps_its_reserve(cached: Cached) -> None:
    cached.config = replace(cached.config, disk_free_bytes_min=1 << 60)
    block = await cached.put(0)
    async with cached.opened() as cache:
        assert await cache.read(block, 0, 1000) == content(block)
        await settled(cache)
        assert cache.blocks == 0
    assert cached.files() == []


async def test_scattered_reads_take_ranges_until_the_block_is_worth_it(cached: Cached) -> None:
    block = await cached.put(0)
    async with cached.opened() as cache:
        for offset in (100, 500, 900):
            assert await cache.read(block, offset, 5, whole=False) == content(block)[offset : offset + 5]
    assert [(offset, length) for _, offset, length in cached.blobs.reads] == [(100, 5), (500, 5), (0, None)]


async def test_prefetching_is_bounded_and_needs_no_reader(cached: Cached) -> None:
    blocks = [await cached.put(index) for index in range(8)]
    async with cached.opened() as cache:
        for block in blocks:
            cache.prefetch(block)
        await settled(cache)
        assert len(cached.blobs.reads) == 4
        cache.prefetch(blocks[0])
        await settled(cache)
    assert len(cached.blobs.reads) == 4
    assert not os.listdir(cached.directory / "scratch")


async def test_mounts_share_what_is_there(cached: Cached) -> None:
    block = await cached.put(0)
    async with cached.opened() as one, cached.opened() as two:
        await one.read(block, 0, 1)
        await settled(one)
        assert await two.read(block, 0, 1000) == content(block)
        assert two.blocks == 1
        await one.make_room(1 << 40)
        assert await two.read(block, 0, 1000) == content(block)
    assert len(cached.blobs.reads) == 2
