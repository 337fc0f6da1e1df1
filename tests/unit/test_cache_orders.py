"""What a person asks of the cache: warm, drop, pin, and what survives a remount."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Hashable
from pathlib import Path

import pytest

from apollofs.fs.copying import copy_range
from apollofs.fs.handles import FileHandle
from apollofs.fs.open_file import OpenFile
from apollofs.fs.room import Room
from apollofs.fs.user_error import UserError
from apollofs.metadata.records import ROOT_INO, Body, RenameFlag
from tests.support.bodies import Mount, World, body_world
from tests.support.volumes import ME

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


async def pinned_files(mount: Mount) -> float:
    """How many are left when the volume was asked for each."""
    await mount.bodies.orders.unpin_what_is_gone()
    return mount.bodies.orders.status()["pinned_count"]


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_the_pin_of_a_file_that_is_gone_goes(world: World, tmp_path: Path, size: int) -> None:
    async with world.mount() as mount, world.mount("b") as other:
        bodies = {name: await stored(mount, name, size) for name in (b"gone", b"replaced", b"moved", b"stays")}
        for body in bodies.values():
            await mount.bodies.orders.pin(body)
        assert await pinned_files(mount) == 4
        for name in bodies:
            mount.volume.inner.forget(bodies[name].inode.ino)
        below = (await other.volume.inner.mkdir(ROOT_INO, b"below", 0o755, ME)).ino
        await other.volume.inner.unlink(ROOT_INO, b"gone")
        await other.volume.inner.rename(ROOT_INO, b"moved", below, b"here", RenameFlag(0))
        await stored(other, b"new", size)
        await other.volume.inner.rename(ROOT_INO, b"new", ROOT_INO, b"replaced", RenameFlag(0))
        assert await pinned_files(mount) == 2
        assert not await mount.bodies.orders.unpin(bodies[b"gone"].inode.ino)
        await mount.bodies.orders.drop_all()
        assert await read_again(world, mount, bodies[b"moved"]) == 0
        assert mount.bodies.orders.pinned_bytes == mount.bodies.orders.status()["used_bytes"]
        await other.volume.inner.unlink(ROOT_INO, b"stays")
    async with world.mount() as mount:
        assert await pinned_files(mount) == 1


async def test_a_pin_of_what_has_several_names_lasts_as_long_as_one_of_them(world: World) -> None:
    async with world.mount() as mount, world.mount("b") as other:
        body = await stored(mount, b"file", LARGE)
        await other.volume.lookup(ROOT_INO, b"file")
        await other.volume.inner.link(body.inode.ino, ROOT_INO, b"other")
        await mount.bodies.orders.pin(await mount.volume.read_body(body.inode.ino))
        await other.volume.inner.unlink(ROOT_INO, b"file")
        assert await pinned_files(mount) == 1
        await other.volume.inner.unlink(ROOT_INO, b"other")
        assert await pinned_files(mount) == 0


async def as_it_is(file: OpenFile) -> None:
    """Nobody else changes it."""


async def test_what_two_files_share_stays_for_the_other(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, b"file", LARGE)
        ino = await mount.create(b"clone")
        handles = [
            FileHandle(file, os.O_RDWR, 0, file.errors.cursor())
            for file in [await mount.bodies.open(each) for each in (body.inode.ino, ino)]
        ]
        await copy_range(handles[0], 0, handles[1], 0, LARGE, as_it_is)
        clone = await mount.volume.read_body(ino)
        assert clone.inode.extents == body.inode.extents
        for each in (body, clone):
            await mount.bodies.orders.pin(each)
        await mount.volume.inner.unlink(ROOT_INO, b"clone")
        assert await pinned_files(mount) == 1
    async with world.mount() as mount:
        await mount.bodies.orders.drop_all()
        assert await read_again(world, mount, body) == 0
        assert await mount.bodies.orders.unpin(body.inode.ino)


async def test_pinned_again_after_a_change_only_the_new_bytes_are_kept(world: World) -> None:
    async with world.mount(cache_bytes_max=20 << 20) as mount:
        body = await stored(mount, b"file", 9 << 20)
        await mount.bodies.orders.pin(body)
        file = await mount.bodies.open(body.inode.ino)
        await file.write(0, b"else" * (9 << 18))
        await file.commit()
        mount.bodies.release(file)
        changed = await mount.volume.read_body(body.inode.ino)
        await mount.bodies.orders.drop_all()
        await mount.bodies.orders.pin(changed)
        await mount.bodies.orders.drop_all()
        assert mount.bodies.orders.pinned_bytes == mount.bodies.orders.status()["used_bytes"] < 10 << 20
        assert await read_again(world, mount, changed) == 0


async def test_all_pins_of_a_directory_can_be_taken_back(world: World, tmp_path: Path) -> None:
    async with world.mount() as mount, world.mount() as other:
        for on in (mount, other):
            await on.bodies.orders.pin(await stored(on, b"%d" % id(on), LARGE))
        unfinished = tmp_path / "a" / "pins" / ".1-what"
        unfinished.touch()
        assert await pinned_files(mount) == 1
        assert await other.bodies.orders.unpin_all() == 2
        assert await pinned_files(mount) == await pinned_files(other) == 0
        await mount.bodies.orders.drop_all()
        assert mount.bodies.orders.status()["used_bytes"] == 0
        assert list((tmp_path / "a" / "pins").iterdir()) == [unfinished]
        os.utime(unfinished, (0, 0))
        await pinned_files(mount)
        assert not unfinished.exists()


async def test_a_full_cache_takes_what_is_warmed_whole(world: World) -> None:
    """Blocks that come side by side each get the room that was made for them."""
    async with world.mount(cache_bytes_max=16 << 20) as mount:
        body = await stored(mount, b"file", 7 << 20)
        await mount.bodies.orders.pin(body)
        for text in (b"else", b"more"):
            file = await mount.bodies.open(body.inode.ino)
            await file.write(0, text * (7 << 18))
            await file.commit()
            mount.bodies.release(file)
            changed = await mount.volume.read_body(body.inode.ino)
            await mount.bodies.orders.pin(changed)
            assert await read_again(world, mount, changed) == 0
            assert mount.bodies.orders.status()["used_bytes"] <= 16 << 20


async def test_a_pin_costs_the_same_however_many_there_are(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.mount() as mount:
        bodies = [await stored(mount, b"%02d" % at, 1000) for at in range(40)]
        asked = 0
        size_of = Room.size_of

        def counted(self: Room, key: Hashable) -> int:
            nonlocal asked
            asked += 1
            return size_of(self, key)

        monkeypatch.setattr(Room, "size_of", counted)
        for body in bodies:
            await mount.bodies.orders.pin(body)
        assert asked <= 4 * len(bodies)
        assert mount.bodies.orders.pinned_bytes == mount.bodies.orders._counted_bytes > 0
        for body in bodies:
            assert await mount.bodies.orders.unpin(body.inode.ino)
        assert (mount.bodies.orders._counted_bytes, mount.bodies.orders.status()["pinned_count"]) == (0, 0)
