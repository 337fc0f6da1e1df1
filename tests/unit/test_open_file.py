"""One open file on one mount: what is read back, what is committed, and what happens when something fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.bodies import Mount, World, body_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made


async def test_small_file_is_committed_inline(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"hello")
    assert await file.read(0, 100) == b"hello"
    assert file.is_dirty
    await file.commit()
    assert not file.is_dirty
    assert world.blobs.puts == []
    assert await mount.content(file.ino) == b"hello"


async def test_large_file_is_one_extent_in_blocks(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    data = bytes(range(250)) * 8
    for start in range(0, len(data), 100):
        await file.write(start, data[start : start + 100])
    await file.commit()
    body = await mount.volume.read_body(file.ino)
    assert len(body.inode.extents) == 1
    assert len(world.blobs.puts) == 8
    assert await mount.content(file.ino) == data
    assert await file.read(500, 1000) == data[500:1500]
    assert world.blobs.reads == []
