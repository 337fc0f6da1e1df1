"""Small bodies that are committed at the same time: one PUT, exact errors, bounded, and nobody waits when idle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreRefused
from apollofs.fs import packing
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.records import ROOT_INO
from tests.support.bodies import Mount, World, body_world
from tests.support.volumes import assert_sound

BLOCK = 4096


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made
        await assert_sound(made.store)


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made


class Gate:
    """Holds PUTs back until it is opened."""

    def __init__(self, world: World) -> None:
        self._open = trio.Event()
        self._world = world
        world.blobs.before_put = self._open.wait

    def open(self) -> None:
        self._world.blobs.before_put = None
        self._open.set()


async def written(mount: Mount, count: int, size: int = 300) -> list[OpenFile]:
    """So many open files with a body of their own, not committed yet."""
    files = []
    for index in range(count):
        file = await mount.bodies.open(await mount.create(b"f%d" % index))
        await file.write(0, bytes([index]) * size)
        files.append(file)
    return files


async def test_a_lone_body_has_a_blob_of_its_own(world: World, mount: Mount) -> None:
    (file,) = await written(mount, 1)
    await file.commit()
    assert len(world.blobs.puts) == 1
    (extent,) = file.inode.extents
    assert (extent.blob_offset, extent.blob_length) == (0, 300)
    assert not mount.volume.commits[-1].is_packed


async def test_what_comes_while_puts_are_in_flight_shares_the_next(world: World, mount: Mount) -> None:
    files = await written(mount, 8)
    gate = Gate(world)
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(file.commit)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.blobs.puts) == packing.SOLO_MAX
        gate.open()
    assert len(world.blobs.puts) == packing.SOLO_MAX + 1
    blobs = {extent.blob for file in files for extent in file.inode.extents}
    assert len(blobs) == packing.SOLO_MAX + 1
    async with world.mount("b") as other:
        for index, file in enumerate(files):
            await other.volume.inner.lookup(ROOT_INO, b"f%d" % index)
            assert await other.content(file.ino) == bytes([index]) * 300
    assert not mount.bodies.writer.packer.blobs_in_use


async def test_a_pack_fits_one_block_and_a_full_one_does_not_wait(world: World, mount: Mount) -> None:
    files = await written(mount, 12, size=1000)
    gate = Gate(world)
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(file.commit)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.blobs.puts) == packing.IN_FLIGHT_MAX
        gate.open()
    lengths = [extent.blob_length for file in files for extent in file.inode.extents]
    assert max(lengths) == 4000
    assert all(length <= BLOCK for length in lengths)


async def test_an_error_reaches_the_members_of_its_pack_only(world: World, mount: Mount) -> None:
    files = await written(mount, 6)
    gate = Gate(world)
    outcomes: dict[int, str] = {}

    async def commit(index: int) -> None:
        try:
            await files[index].commit()
        except BodyUnavailable:
            outcomes[index] = "failed"
        else:
            outcomes[index] = "committed"

    async with trio.open_nursery() as nursery:
        for index in range(6):
            nursery.start_soon(commit, index)
            await trio.testing.wait_all_tasks_blocked()
        world.blobs.fail_puts = [BlobStoreRefused("no")]
        gate.open()
    assert outcomes == {0: "committed", 1: "committed", 2: "failed", 3: "failed", 4: "failed", 5: "failed"}
    for file in files[2:]:
        await file.commit()
    assert [await mount.content(file.ino) for file in files] == [bytes([index]) * 300 for index in range(6)]


@pytest.mark.parametrize("in_flight", [False, True])
async def test_who_is_cancelled_harms_nobody(world: World, mount: Mount, in_flight: bool) -> None:
    files = await written(mount, 5)
    gates = [Gate(world)]
    scope = trio.CancelScope()

    async def commit_cancelled() -> None:
        with scope:
            await files[3].commit()

    async with trio.open_nursery() as nursery:
        for index in (0, 1, 2):
            nursery.start_soon(files[index].commit)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(commit_cancelled)
        nursery.start_soon(files[4].commit)
        await trio.testing.wait_all_tasks_blocked()
        if in_flight:
            first = gates.pop()
            gates.append(Gate(world))
            first._open.set()
            await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        gates.pop().open()
    assert files[3].is_dirty
    await files[3].commit()
    assert [await mount.content(file.ino) for file in files] == [bytes([index]) * 300 for index in range(5)]
    assert not mount.bodies.writer.packer.blobs_in_use


async def test_a_put_that_nobody_waits_for_is_given_up(world: World, mount: Mount) -> None:
    (file,) = await written(mount, 1)
    Gate(world)
    with trio.move_on_after(0) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.commit)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert world.blobs.under_way == 0
    assert file.is_dirty
    world.blobs.before_put = None
    await file.commit()


async def test_a_member_overwritten_and_unlinked_leaves_the_others(world: World, mount: Mount) -> None:
    files = await written(mount, 5)
    gate = Gate(world)
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(file.commit)
            await trio.testing.wait_all_tasks_blocked()
        gate.open()
    assert len({extent.blob for file in files[2:] for extent in file.inode.extents}) == 1
    await files[2].write(0, b"new" * 100)
    await files[2].commit()
    await mount.volume.inner.unlink(ROOT_INO, b"f3")
    assert await mount.content(files[2].ino) == b"new" * 100
    assert await mount.content(files[4].ino) == bytes([4]) * 300


async def test_a_pack_is_in_use_until_its_last_member_is_committed(world: World, mount: Mount) -> None:
    files = await written(mount, 4)
    gate, commits = Gate(world), trio.Event()
    packer = mount.bodies.writer.packer
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(file.commit)
            await trio.testing.wait_all_tasks_blocked()
        mount.volume.before_commit = commits.wait
        gate.open()
        await trio.testing.wait_all_tasks_blocked()
        assert len(packer.blobs_in_use) == 3
        commits.set()
    assert packer.blobs_in_use == set()


async def test_bodies_in_memory_are_bounded(world: World, mount: Mount) -> None:
    files = await written(mount, packing.MEMBERS_MAX + 10, size=100)
    gate = Gate(world)
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(file.commit)
        await trio.testing.wait_all_tasks_blocked()
        packer = mount.bodies.writer.packer
        assert packer._room.borrowed_tokens == packing.MEMBERS_MAX
        gate.open()
    assert not any(file.is_dirty for file in files)
