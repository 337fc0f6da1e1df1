"""Reader: bytes from inline bodies, extents and holes; read-ahead; deadlines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.fs.errors import BodyUnavailable, CorruptBody
from apollofs.fs.reader import AccessPattern
from apollofs.metadata.records import Body, Extent, Inode, InodeFlag
from tests.support.bodies import Mount, World, body_world

DATA = bytes(at * 31 % 251 for at in range(5000))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made


def body_of(size: int, *extents: Extent, inline: bytes = b"") -> Body:
    flags = InodeFlag.INLINE if inline else InodeFlag(0)
    inode = Inode(9, 0o100644, 1, 0, 0, size, 0, 0, 0, 0, flags=flags, extents=extents, inline_bytes=len(inline))
    return Body(inode, inline)


async def stored(mount: Mount, data: bytes = DATA) -> Body:
    """A file of one extent whose blocks are not cached."""
    file = await mount.bodies.open(await mount.create())
    await file.write(0, data)
    await file.commit()
    await mount.bodies.cache.settle()
    await mount.bodies.cache.make_room(1 << 40)
    return await mount.volume.read_body(file.ino)


async def test_inline_bytes_and_the_hole_behind_them(mount: Mount) -> None:
    body = body_of(20, inline=b"0123456789")
    assert await mount.bodies.reader.pread(body, 5, 100) == b"56789" + bytes(10)
    assert await mount.bodies.reader.pread(body, 15, 2) == bytes(2)
    assert await mount.bodies.reader.pread(body, 20, 2) == b""


async def test_extents_holes_and_the_end(mount: Mount) -> None:
    (extent,) = (await stored(mount)).inode.extents
    blob, total = extent.blob, extent.blob_length
    body = body_of(4000, Extent(100, 50, blob, 1000, total), Extent(150, 700, blob, 200, total))
    expected = (bytes(100) + DATA[1000:1050] + DATA[200:900]).ljust(4000, b"\0")
    for offset, size in ((0, 4000), (90, 70), (149, 2), (840, 20), (3990, 100), (100, 750), (0, 50)):
        assert await mount.bodies.reader.pread(body, offset, size) == expected[offset : offset + size]


async def test_an_extent_that_leaves_its_blob_is_corrupt(mount: Mount) -> None:
    (extent,) = (await stored(mount)).inode.extents
    body = body_of(100, Extent(0, 100, extent.blob, 4950, extent.blob_length))
    with pytest.raises(CorruptBody):
        await mount.bodies.reader.pread(body, 0, 100)


async def test_blocks_are_fetched_side_by_side(world: World, mount: Mount) -> None:
    body = await stored(mount)
    waiting = 0

    async def gather() -> None:
        nonlocal waiting
        waiting += 1
        await trio.testing.wait_all_tasks_blocked()
        assert waiting > 1

    world.blobs.before_read = gather
    assert await mount.bodies.reader.pread(body, 0, 5000) == DATA
    assert len(world.blobs.reads) == 20


async def test_sequential_reading_runs_ahead_and_scattered_does_not(world: World, tmp_path: Path) -> None:
    async with world.mount("ahead", read_ahead_blocks_max=3) as mount:
        body = await stored(mount)
        pattern = AccessPattern()
        world.blobs.reads.clear()
        assert await mount.bodies.reader.pread(body, 0, 16, pattern) == DATA[:16]
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.blobs.reads) == 2
        assert await mount.bodies.reader.pread(body, 16, 240, pattern) == DATA[16:256]
        for offset in (256, 512, 768):
            assert await mount.bodies.reader.pread(body, offset, 256, pattern) == DATA[offset : offset + 256]
            await trio.testing.wait_all_tasks_blocked()
        assert len(world.blobs.reads) == 7
        await mount.bodies.reader.pread(body, 4000, 10, pattern)
        await trio.testing.wait_all_tasks_blocked()
        assert [entry[1:] for entry in world.blobs.reads[7:]] == [(160, 10)]


async def test_a_pack_is_fetched_whole_once_several_of_it_are_read(world: World, mount: Mount) -> None:
    (extent,) = (await stored(mount)).inode.extents
    world.blobs.reads.clear()
    for at in range(5):
        member = body_of(40, Extent(0, 40, extent.blob, at * 40, extent.blob_length))
        assert await mount.bodies.reader.pread(member, 0, 40, AccessPattern()) == DATA[at * 40 : at * 40 + 40]
        await trio.testing.wait_all_tasks_blocked()
    assert [entry[1:] for entry in world.blobs.reads] == [(0, 40), (40, 40), (0, None)]


async def test_a_read_has_a_deadline(world: World, mock_clock: trio.testing.MockClock) -> None:
    async with world.mount("slow", read_deadline_s=2.0) as mount:
        body = await stored(mount)

        async def expire() -> None:
            mock_clock.jump(2.1)
            await trio.sleep_forever()

        world.blobs.before_read = expire
        with pytest.raises(BodyUnavailable):
            await mount.bodies.reader.pread(body, 0, 10)
