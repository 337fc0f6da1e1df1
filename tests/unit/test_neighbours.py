"""Small files that are opened one after the other: the next ones are there before they are asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio.testing

from apollofs.fs import neighbours
from apollofs.fs.neighbours import natural
from apollofs.metadata.records import ROOT_INO
from tests.support.bodies import Mount, World, body_world

FILES = 40


def content(at: int, size: int = 200) -> bytes:
    return bytes((at * 13 + byte) % 251 for byte in range(size))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made


@pytest.fixture
async def inline_world(tmp_path: Path) -> AsyncIterator[World]:
    """Whose small files are inline, and larger than what is read with the names."""
    async with body_world(tmp_path, inline_bytes_max=1024, block_bytes=1024) as made:
        yield made


async def write_files(mount: Mount, size: int = 200, prefix: bytes = b"f") -> None:
    for at in range(FILES):
        file = await mount.bodies.open(await mount.create(b"%s%d" % (prefix, at)))
        await file.write(0, content(at, size))
        await file.commit()
        mount.bodies.release(file)
    await mount.bodies.cache.settle()
    await mount.bodies.cache.make_room(1 << 40)


async def read_as_a_process(mount: Mount, name: bytes) -> bytes:
    """Look a file up, open it and read it, as the kernel would ask."""
    inode = await mount.volume.inner.lookup(ROOT_INO, name)
    file = await mount.bodies.open(inode.ino)
    mount.bodies.will_read(file)
    data = bytes(await file.read(0, 1000))
    mount.bodies.release(file)
    await trio.testing.wait_all_tasks_blocked()
    return data


def test_numbers_in_names_are_numbers() -> None:
    names = [b"a10", b"a9", b"b", b"a9.jpg", b"10", b"9", b"a9-2", b"a9-11", b""]
    assert sorted(names, key=natural) == [b"", b"9", b"10", b"a9", b"a9-2", b"a9-11", b"a9.jpg", b"a10", b"b"]


async def test_what_follows_is_fetched_ahead(world: World) -> None:
    async with world.mount("a") as writer, world.mount("b") as mount:
        await write_files(writer)
        world.blobs.reads.clear()
        for at in range(10):
            assert await read_as_a_process(mount, b"f%d" % at) == content(at)
        ahead = len(world.blobs.reads)
        assert ahead > 10
        asked = mount.volume.inner.asked
        for at in range(10, FILES):
            assert await read_as_a_process(mount, b"f%d" % at) == content(at)
        assert len(world.blobs.reads) == FILES
        assert mount.volume.inner.asked == asked  # the listing knows all names, and the bodies


async def test_very_small_files_come_with_their_names(world: World) -> None:
    async with world.mount("a") as writer, world.mount("b") as mount:
        await write_files(writer, 30)
        for at in range(5):
            await read_as_a_process(mount, b"f%d" % at)
        asked = mount.volume.inner.asked
        for at in range(5, FILES):
            assert await read_as_a_process(mount, b"f%d" % at) == content(at, 30)
        assert mount.volume.inner.asked == asked
        assert world.blobs.reads == []


async def test_inline_files_are_fetched_ahead_many_at_once(inline_world: World) -> None:
    async with inline_world.mount("a") as writer, inline_world.mount("b") as mount:
        await write_files(writer, 300)
        for at in range(FILES):
            assert await read_as_a_process(mount, b"f%d" % at) == content(at, 300)
            if at == 4:
                asked = mount.volume.inner.asked
        assert mount.volume.inner.asked <= asked + 4
        assert inline_world.blobs.reads == []


async def test_an_inline_file_that_was_replaced_meanwhile_is_read_anew(inline_world: World) -> None:
    async with inline_world.mount("a") as writer, inline_world.mount("b") as mount:
        await write_files(writer, 300)
        for at in range(8):
            await read_as_a_process(mount, b"f%d" % at)
        await write_files(writer, 310, prefix=b"new")
        for at in range(8, FILES):
            await writer.volume.inner.rename(ROOT_INO, b"new%d" % at, ROOT_INO, b"f%d" % at)
            assert await read_as_a_process(mount, b"f%d" % at) == content(at, 310)


async def test_files_that_came_later_are_fetched_ahead_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "STRANGER_TTL_S", 0.0)
    async with world.mount("a") as writer, world.mount("b") as mount:
        await write_files(writer)
        for at in range(FILES):
            await read_as_a_process(mount, b"f%d" % at)
        await write_files(writer, prefix=b"g")
        world.blobs.reads.clear()
        for at in range(10):
            assert await read_as_a_process(mount, b"g%d" % at) == content(at)
        assert len(world.blobs.reads) > 10


async def test_scattered_opens_fetch_nothing_else(world: World) -> None:
    async with world.mount("a") as writer, world.mount("b") as mount:
        await write_files(writer)
        world.blobs.reads.clear()
        opened = list(range(0, FILES, 5))
        for at in opened:
            await read_as_a_process(mount, b"f%d" % at)
        assert len(world.blobs.reads) == len(opened)


async def test_a_directory_that_is_too_large_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ENTRIES_MAX", 10)
    async with world.mount("a") as writer, world.mount("b") as mount:
        await write_files(writer)
        world.blobs.reads.clear()
        for at in range(9, 20):
            assert await read_as_a_process(mount, b"f%d" % at) == content(at)
        assert len(world.blobs.reads) == 11
