"""What is written through the daemon and stored before its commit: the commit refers to that, and to nothing else."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs import staging
from apollofs.fs.errors import BodyLost, BodyUnavailable
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passing import Passing
from apollofs.metadata.records import ROOT_INO, SetAttr
from tests.support.bodies import BLOCK, Mount, World, mount, world

__all__ = ["mount", "world"]


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MEMORY_BYTES_MAX", 0)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def store_ready(file: OpenFile) -> int:
    """One poll of the uploader; how many blocks it stored."""
    return sum([await upload() for upload in await file.ready_uploads()])


async def store_all(file: OpenFile) -> int:
    """Polls until nothing is ready any more."""
    stored = await store_ready(file)
    while more := await store_ready(file):
        stored += more
    return stored


async def opened(mount: Mount, name: bytes = b"f") -> OpenFile:
    return await mount.bodies.open(await mount.create(name))


async def test_a_commit_finds_what_was_stored_while_the_file_grew(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 20 * BLOCK + 77)
    for start in range(0, len(data), 1000):
        await file.write(start, data[start : start + 1000])
    assert file in mount.bodies.growing_files
    assert await store_ready(file) == 0, "a block that was just seen for the first time may be written still"
    assert await store_all(file) == 20
    assert len(world.blobs.puts) == 20
    await file.commit()
    assert len(world.blobs.puts) == 21
    body = await mount.volume.read_body(file.ino)
    assert len(body.inode.extents) == 1
    assert await mount.content(file.ino) == data
    assert world.blobs.reads == [], "what was stored early is in the cache too"
    assert await file.ready_uploads() == []
    assert file not in mount.bodies.growing_files


async def test_the_mount_stores_it_unasked(world: World) -> None:
    async with world.mount("b", commit_interval_s=3600.0) as mount, trio.open_nursery() as nursery:
        nursery.start_soon(Passing(mount.bodies, lambda before, after: None).upload_early)
        file, data = await opened(mount), noise(1, 3 * BLOCK + 1)
        await file.write(0, data)
        with trio.fail_after(60):
            while True:
                if len(world.blobs.puts) == 3 and not world.blobs.under_way:
                    break
                await trio.sleep(0.01)
        assert file.is_dirty
        await file.commit()
        assert len(world.blobs.puts) == 4
        assert await mount.content(file.ino) == data
        nursery.cancel_scope.cancel()


async def test_nothing_is_left_to_be_stored(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 3 * BLOCK)
    await file.write(0, data)
    assert await store_all(file) == 3
    await file.commit()
    assert len(world.blobs.puts) == 3
    assert await mount.content(file.ino) == data


async def test_a_block_that_is_written_anew_is_stored_anew(world: World, mount: Mount) -> None:
    file, data = await opened(mount), bytearray(noise(1, 4 * BLOCK))
    await file.write(0, bytes(data))
    assert await store_all(file) == 4
    for at, new in ((BLOCK + 5, b"in place"), (2 * BLOCK, noise(2, BLOCK)), (3 * BLOCK, noise(3, 3000))):
        await file.write(at, new)
        data[at : at + len(new)] = new
    assert await store_all(file) > 0
    await file.write(3 * BLOCK + 3000, b"after")
    data[3 * BLOCK + 3000 : 3 * BLOCK + 3005] = b"after"
    await file.commit()
    assert await mount.content(file.ino) == data


async def test_what_is_written_while_a_block_is_on_its_way(world: World, mount: Mount) -> None:
    file, data = await opened(mount), bytearray(noise(1, 2 * BLOCK))
    await file.write(0, bytes(data))
    await store_ready(file)

    async def overwrite() -> None:
        world.blobs.before_put = None
        await file.write(10, b"later")

    world.blobs.before_put = overwrite
    await store_ready(file)
    data[10:15] = b"later"
    assert await file.read(0, len(data)) == data
    await file.commit()
    assert await mount.content(file.ino) == data


async def test_a_commit_waits_for_what_is_on_its_way(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 2 * BLOCK)
    await file.write(0, data)
    await store_ready(file)
    go_on = trio.Event()
    world.blobs.before_put = go_on.wait
    async with trio.open_nursery() as nursery:
        for upload in await file.ready_uploads():
            nursery.start_soon(upload)
        with trio.fail_after(60):
            while world.blobs.under_way < 2:
                await trio.lowlevel.checkpoint()
        nursery.start_soon(file.commit)
        await trio.testing.wait_all_tasks_blocked()
        assert await file.ready_uploads() == []
        go_on.set()
    assert len(world.blobs.puts) == 2
    assert await mount.content(file.ino) == data


async def test_writers_of_two_parts_of_a_file(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 16 * BLOCK)
    half = len(data) // 2
    for start in range(0, half, 512):
        await file.write(start, data[start : start + 512])
        await file.write(half + start, data[half + start : half + start + 512])
    assert await store_all(file) == 16
    await file.commit()
    assert len(world.blobs.puts) == 16
    assert await mount.content(file.ino) == data


async def test_what_is_appended_moves_with_what_others_append(world: World, mount: Mount) -> None:
    async with world.mount("b") as other:
        file = await opened(mount)
        theirs = await other.bodies.open((await other.volume.inner.lookup(ROOT_INO, b"f")).ino)
        first, second = noise(1, 1000), noise(2, 5 * BLOCK + 9)
        await file.append(second)
        assert await store_all(file) == 5
        await theirs.append(first)
        await theirs.commit()
        await file.commit()
        assert await mount.content(file.ino) == first + second


async def test_a_failed_commit_is_made_good_by_the_next(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 3 * BLOCK + 5)
    await file.write(0, data)
    assert await store_all(file) == 3
    world.blobs.fail_puts = [BlobStoreUnavailable("down")]
    with pytest.raises(BodyUnavailable):
        await file.commit()
    await file.write(len(data), data)
    await store_all(file)
    await file.commit()
    assert await mount.content(file.ino) == data + data


async def test_a_block_that_can_not_be_stored_is_left_to_the_commit(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 2 * BLOCK)
    await file.write(0, data)
    await store_ready(file)
    world.blobs.fail_puts = [BlobStoreUnavailable("down")]
    first, second = await file.ready_uploads()
    with pytest.raises(BodyUnavailable):
        await first()
    assert await second()
    await file.commit()
    assert await mount.content(file.ino) == data


async def test_a_lost_session_takes_what_was_stored_with_it(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 2 * BLOCK)
    await file.write(0, data)
    assert await store_all(file) == 2
    before = set(world.blobs.puts)
    cursor = file.errors.cursor()
    file.session_lost()
    with pytest.raises(BodyLost):
        await file.write(0, data, cursor)
    await file.write(0, data, cursor)
    assert await store_all(file) == 2
    await file.commit()
    body = await mount.volume.read_body(file.ino)
    assert all(f"/{extent.blob:016x}/" not in name for extent in body.inode.extents for name in before)
    assert await mount.content(file.ino) == data


async def test_what_is_cut_and_what_is_punched_is_gone(mount: Mount) -> None:
    file, data = await opened(mount), bytearray(noise(1, 6 * BLOCK))
    await file.write(0, bytes(data))
    assert await store_all(file) == 6
    await file.truncate(SetAttr(size_bytes=4 * BLOCK + 10))
    del data[4 * BLOCK + 10 :]
    await file.punch(BLOCK, BLOCK + 100, keep_size=True)
    data[BLOCK : 2 * BLOCK + 100] = bytes(BLOCK + 100)
    assert await mount.content(file.ino) == data


async def test_a_file_that_loses_its_name_is_left_alone(world: World, mount: Mount) -> None:
    file, data = await opened(mount), noise(1, 2 * BLOCK)
    await file.write(0, data)
    await store_ready(file)
    late = await file.ready_uploads()
    file.orphan()
    assert await file.ready_uploads() == []
    mount.bodies.release(file)
    for upload in late:
        assert not await upload(), "the staging file is closed"
    assert world.blobs.puts == []


@pytest.mark.parametrize("seed", range(6))
async def test_any_writes_and_any_polls(world: World, mount: Mount, seed: int) -> None:
    """Beside a bytearray; commits, uploads that overlap with writes, failures."""
    chance = random.Random(seed)
    file, expected = await opened(mount), bytearray()
    async with trio.open_nursery() as nursery:
        for _ in range(300):
            match chance.choice(["write", "write", "grow", "grow", "poll", "poll", "poll", "commit", "cut", "punch"]):
                case "write":
                    start = chance.randrange(len(expected) + 1)
                    await write(file, expected, start, chance.randbytes(chance.randrange(1, 3 * BLOCK)))
                case "grow":
                    await write(file, expected, len(expected), chance.randbytes(chance.randrange(1, 6 * BLOCK)))
                case "poll":
                    for upload in await file.ready_uploads():
                        nursery.start_soon(upload)
                    await trio.lowlevel.checkpoint()
                case "commit" if chance.random() < 0.3:
                    await file.commit()
                case "cut" if chance.random() < 0.2:
                    size = chance.randrange(len(expected) + 1)
                    await file.truncate(SetAttr(size_bytes=size))
                    del expected[size:]
                case "punch" if len(expected) > BLOCK and chance.random() < 0.3:
                    start = chance.randrange(len(expected) - BLOCK)
                    await file.punch(start, BLOCK, keep_size=True)
                    expected[start : start + BLOCK] = bytes(BLOCK)
            assert await file.read(0, len(expected)) == expected
    await file.commit()
    assert await mount.content(file.ino) == expected


async def write(file: OpenFile, expected: bytearray, start: int, data: bytes) -> None:
    await file.write(start, data)
    expected[start : start + len(data)] = data
