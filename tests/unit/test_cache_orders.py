"""What a person asks of the cache: warm, drop, pin, and what survives a remount."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from apollofs.fs.user_error import UserError
from apollofs.metadata.records import Body
from tests.support.bodies import Mount, World, body_world

BLOCK = 1 << 18
LARGE = 6 << 20


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made


async def stored(mount: Mount, name: bytes, size: int) -> Body:
    file = await mount.bodies.open(await mount.create(name))
    await file.write(0, name * (size // len(name)))
    await file.commit()
    mount.bodies.release(file)
    await mount.bodies.orders.drop_all()
    return await mount.volume.read_body(file.ino)


async def read_again(world: World, mount: Mount, body: Body) -> int:
    """Requests to the store for all of a body."""
    world.blobs.reads.clear()
    await mount.bodies.reader.pread(body, 0, body.inode.size_bytes)
    mount.bodies.reader.forget(body.inode.ino)
    return len(world.blobs.reads)


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_warm_and_drop(world: World, size: int) -> None:
    async with world.mount() as mount:
        body, orders = await stored(mount, b"file", size), mount.bodies.orders
        await orders.warm(body, 0, size)
        assert await read_again(world, mount, body) == 0
        assert await orders.drop(body)
        assert orders.status()["used_bytes"] == 0
        assert await read_again(world, mount, body) > 0


async def test_a_part_is_warmed_alone(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, b"file", LARGE)
        world.blobs.reads.clear()
        await mount.bodies.orders.warm(body, 5 * BLOCK, 2 * BLOCK)
        assert len(world.blobs.reads) == 2


async def test_what_is_open_is_not_dropped(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, b"file", LARGE)
        image = await mount.bodies.images.open(body)
        assert image is not None
        assert not await mount.bodies.orders.drop(body)
        mount.bodies.images.release(image)
        assert await mount.bodies.orders.drop(body)


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_a_pin_stays_over_remounts_until_it_is_taken_back(world: World, size: int) -> None:
    async with world.mount() as mount:
        body = await stored(mount, b"file", size)
        await mount.bodies.orders.pin(body)
        await mount.bodies.orders.drop_all()
        assert not await mount.bodies.orders.drop(body)
        assert await read_again(world, mount, body) == 0
    async with world.mount() as mount, world.mount() as other:
        for one in (mount, other):
            await one.bodies.orders.drop_all()
        assert await read_again(world, mount, body) == 0
        assert mount.bodies.orders.status()["pinned_count"] == 1
        assert await mount.bodies.orders.unpin(body.inode.ino)
        assert not await mount.bodies.orders.unpin(body.inode.ino)
        await mount.bodies.orders.drop_all()
        assert await read_again(world, mount, body) > 0


async def test_pins_leave_room(world: World) -> None:
    async with world.mount(cache_bytes_max=16 << 20) as mount:
        bodies = [await stored(mount, b"%d" % at, LARGE) for at in range(3)]
        for body in bodies[:2]:
            await mount.bodies.orders.pin(body)
            await mount.bodies.orders.pin(body)
        with pytest.raises(UserError, match="pins may take"):
            await mount.bodies.orders.pin(bodies[2])
        assert await mount.bodies.orders.unpin(bodies[0].inode.ino)
        await mount.bodies.orders.pin(bodies[2])


async def test_a_pin_of_what_is_gone_goes_too(world: World, tmp_path: Path) -> None:
    async with world.mount() as mount:
        body = await stored(mount, b"file", LARGE)
        await mount.bodies.orders.pin(body)
    junk = tmp_path / "a" / "pins" / "bjunk"
    junk.write_bytes(b"")
    for path in (tmp_path / "a" / "images").rglob("*"):
        if path.is_file():
            path.unlink()
    async with world.mount() as mount:
        assert mount.bodies.orders.status()["pinned_count"] == 0
    assert list((tmp_path / "a" / "pins").iterdir()) == []


@pytest.mark.expects_log("images are not cached as they should be")
async def test_warming_says_where_the_disk_does_not_take_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.mount(cache_bytes_max=16 << 20) as mount:
        body = await stored(mount, b"file", 20 << 20)
        with pytest.raises(UserError, match="no room"):
            await mount.bodies.orders.warm(body, 0, 20 << 20)
        small = await stored(mount, b"other", LARGE)
        (tmp_path / "a" / "images").rename(tmp_path / "elsewhere")
        (tmp_path / "a" / "images").write_bytes(b"a file in its place")
        with pytest.raises(UserError, match="can't be used"):
            await mount.bodies.orders.warm(small, 0, LARGE)
