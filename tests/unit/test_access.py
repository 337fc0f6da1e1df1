"""What reads of one handle look like, and what is fetched ahead for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio.testing

from apollofs.fs.access import AHEAD_FACTOR, STREAMS_MAX, AccessPattern
from apollofs.metadata.records import Body
from tests.support.bodies import Mount, World, body_world

MIB = 1 << 20
BLOCK = MIB
SLACK = MIB


def noted(pattern: AccessPattern, *offsets: int, size: int = MIB) -> list[bool]:
    return [pattern.note(offset, size, SLACK) for offset in offsets]


def test_reading_from_the_start_is_sequential_from_the_start() -> None:
    pattern = AccessPattern()
    assert noted(pattern, 0, MIB, 2 * MIB) == [True, True, True]
    assert pattern.ahead_bytes == 3 * MIB * AHEAD_FACTOR


def test_reads_out_of_order_are_of_the_same_stream() -> None:
    pattern = AccessPattern()
    assert noted(pattern, 0, MIB, MIB // 2, 3 * MIB // 2, size=MIB // 2) == [True, True, True, True]


def test_several_streams_in_one_file() -> None:
    pattern = AccessPattern()
    starts = [0, 100 * MIB, 200 * MIB, 300 * MIB]
    noted(pattern, *starts)
    for step in range(1, 4):
        assert noted(pattern, *(start + step * MIB for start in starts)) == [True] * 4
    assert pattern.ahead_bytes == 4 * MIB * AHEAD_FACTOR


def test_scattered_reads_are_no_stream_and_strides_are_seen() -> None:
    pattern = AccessPattern()
    assert noted(pattern, 500 * MIB, 90 * MIB, 310 * MIB) == [False, False, False]
    assert (pattern.ahead_bytes, pattern.stride) == (0, 0)
    noted(pattern, 320 * MIB, 330 * MIB)
    assert pattern.stride == 10 * MIB
    noted(pattern, 700 * MIB)
    assert pattern.stride == 0


def test_streams_are_bounded() -> None:
    pattern = AccessPattern()
    noted(pattern, *(at * 1000 * MIB for at in range(1, 50)))
    assert len(pattern._streams) == STREAMS_MAX


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made


async def stored(mount: Mount, size: int) -> Body:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, bytes(range(256)) * (size // 256))
    await file.commit()
    await mount.bodies.orders.drop_all()
    return await mount.volume.read_body(file.ino)


async def settled(mount: Mount, body: Body) -> None:
    image = await mount.bodies.images.open(body)
    assert image is not None
    await image.settle()
    mount.bodies.images.release(image)


async def test_all_downloads_are_busy_after_the_first_reads(world: World) -> None:
    async with world.mount(downloads_max=6) as mount:
        body = await stored(mount, 20 * MIB)
        image = await mount.bodies.images.open(body)  # what waits for a thread would look as if it waited for us
        assert image is not None
        go_on = trio.Event()
        world.blobs.before_read = go_on.wait
        world.blobs.reads.clear()
        pattern = AccessPattern()
        async with trio.open_nursery() as nursery:
            for at in range(4):
                nursery.start_soon(mount.bodies.reader.pread, body, at * MIB // 4, MIB // 4, pattern)
            await trio.testing.wait_all_tasks_blocked()
            most = len(world.blobs.reads)
            go_on.set()
        assert most == 6
        await image.settle()


async def test_one_read_of_a_header_fetches_little(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, 20 * MIB)
        world.blobs.reads.clear()
        await mount.bodies.reader.pread(body, 0, 4096, AccessPattern())
        await settled(mount, body)
        assert len(world.blobs.reads) == 1


async def test_strided_reads_are_fetched_ahead_and_scattered_ones_are_not(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, 40 * MIB)
        world.blobs.reads.clear()
        pattern = AccessPattern()
        for at in (30, 7, 21):
            await mount.bodies.reader.pread(body, at * MIB + 100, 50, pattern)
        assert [entry[1:] for entry in world.blobs.reads] == [(100, 50)] * 3
        for at in (3, 9, 15):
            await mount.bodies.reader.pread(body, at * MIB + 100, 50, pattern)
        await settled(mount, body)
        fetched = {int(name[-8:], 16) for name, _, length in world.blobs.reads if length is None}
        assert {21, 27, 33, 39} <= fetched
