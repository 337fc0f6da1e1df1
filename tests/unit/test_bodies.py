"""Open files of a mount: counting, committing in the background and all at once, going on after failures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreRefused
from apollofs.fs.errors import BodyUnavailable
from tests.support.bodies import World, body_world
from tests.support.volumes import assert_sound


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made
    await assert_sound(made.store)


async def test_all_opens_of_an_inode_share_one_file(world: World) -> None:
    async with world.mount() as mount:
        one = await mount.bodies.open(await mount.create())
        two = await mount.bodies.open(one.ino)
        assert one is two
        mount.bodies.release(one)
        assert mount.bodies.find(one.ino) is one
        mount.bodies.release(two)
        assert mount.bodies.find(one.ino) is None


async def test_a_file_is_kept_until_it_is_committed(world: World) -> None:
    async with world.mount() as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"x")
        mount.bodies.release(file)
        assert mount.bodies.find(file.ino) is file
        await mount.bodies.commit_all()
        assert mount.bodies.find(file.ino) is None
        assert await mount.content(file.ino) == b"x"


async def test_open_sees_the_newest_body(world: World) -> None:
    async with world.mount("a") as a, world.mount("b") as b:
        file = await a.bodies.open(await a.create())
        await b.volume.inner.lookup(1, b"f")
        theirs = await b.bodies.open(file.ino)
        await theirs.write(0, b"x" * 300)
        await theirs.commit()
        assert (await a.bodies.open(file.ino)) is file
        assert await file.read(0, 1000) == b"x" * 300


async def test_written_files_are_committed_after_a_while(world: World, mock_clock: trio.testing.MockClock) -> None:
    async with world.mount(commit_interval_s=5.0) as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"x" * 300)
        for _ in range(2):
            assert file.is_dirty
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(2.6)
        while file.is_dirty:
            await trio.testing.wait_all_tasks_blocked()
        assert await mount.content(file.ino) == b"x" * 300


@pytest.mark.expects_log("could not be committed and is tried again")
async def test_all_files_are_tried_and_a_failing_one_again(world: World) -> None:
    async with world.mount() as mount:
        files = [await mount.bodies.open(await mount.create(b"%d" % index)) for index in range(5)]
        for file in files:
            await file.write(0, b"x" * 300)
        world.blobs.fail_puts = [BlobStoreRefused("no")]
        with pytest.raises(BodyUnavailable):
            await mount.bodies.commit_all()
        assert len(mount.bodies.dirty_files) == 1
        await mount.bodies.commit_all()
        for file in files:
            assert await mount.content(file.ino) == b"x" * 300


async def test_nothing_is_left_on_disk_but_the_cache(world: World, tmp_path: Path) -> None:
    async with world.mount("m") as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"x" * 200_000)
        await file.commit()
        await file.write(0, b"never committed" * 10_000)
    left = [path.name for path in (tmp_path / "m" / "staging").rglob("*") if path.is_file()]
    assert left == [".lock"]


async def test_an_open_costs_one_request_whoever_changed_the_file(world: World) -> None:
    async with world.mount("a") as a, world.mount("b") as b:
        file = await a.bodies.open(await a.create())
        await b.volume.inner.lookup(1, b"f")
        theirs = await b.bodies.open(file.ino)
        await theirs.write(0, b"x" * 300)
        await theirs.commit()
        before = a.volume.body_reads
        await a.bodies.open(file.ino)
        assert a.volume.body_reads == before + 1
        assert file.size_bytes == 300
