"""One open file: what is read back and what is committed, while others change it too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import NoSuchBlob
from apollofs.fs import open_file, plan
from apollofs.fs.errors import MissingBlob, NoDataThere
from apollofs.metadata.errors import OperationNotPermitted
from apollofs.metadata.ops import body as body_ops
from apollofs.metadata.records import SetAttr
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


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_staged_bytes_are_read_over_stored_ones_and_holes(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(100, b"a" * 1000)
    await file.commit()
    await file.write(50, b"b" * 100)
    await file.write(2000, b"c")
    assert await file.read(0, 5000) == bytes(50) + b"b" * 100 + b"a" * 950 + bytes(900) + b"c"
    assert await file.seek_data(0) == 50
    assert await file.seek_hole(50) == 1100
    assert await file.seek_data(1100) == 2000
    assert await file.seek_hole(2000) == 2001
    assert file.allocated_bytes == 1051
    with pytest.raises(NoDataThere):
        await file.seek_data(2001)
    with pytest.raises(NoDataThere):
        await file.seek_hole(2001)


async def test_attributes_of_a_dirty_file_are_those_of_this_mount(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    before = file.inode
    await file.write(10, b"x")
    assert file.inode.size_bytes == 11
    assert file.inode.mtime_ns > before.mtime_ns
    changed = await mount.volume.setattr(file.ino, SetAttr(mode=0o600))
    await file.refresh(changed)
    assert file.inode.mode & 0o777 == 0o600
    assert file.inode.size_bytes == 11


async def test_a_time_that_was_set_after_a_write_survives_the_commit(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 500)
    async with file.expecting_mtime(12345):
        file.adopt(await mount.volume.setattr(file.ino, SetAttr(mtime_ns=12345)))
    await file.commit()
    assert (await mount.volume.inner.getattr(file.ino)).mtime_ns == 12345


async def test_a_time_that_could_not_be_set_is_not_committed(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 500)
    written_ns = file.inode.mtime_ns
    with pytest.raises(OperationNotPermitted):
        async with file.expecting_mtime(12345):
            raise OperationNotPermitted("by the test")
    assert file.inode.mtime_ns == written_ns
    await file.commit()
    assert (await mount.volume.inner.getattr(file.ino)).mtime_ns == written_ns


async def test_a_body_that_was_replaced_is_read_anew(world: World, mount: Mount) -> None:
    """Its old blob may have been collected since this mount last looked."""
    async with world.mount("b") as other:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"old" * 100)
        await file.commit()
        await other.volume.inner.lookup(1, b"f")
        theirs = await other.bodies.open(file.ino)
        await theirs.write(0, b"new" * 100)
        await theirs.commit()
        world.blobs.fail_reads = [NoSuchBlob("collected")]
        await mount.bodies.cache.settle()
        await mount.bodies.cache.make_room(1 << 40)
        assert await file.read(0, 1000) == b"new" * 100


async def test_a_read_under_way_goes_on_in_the_body_that_became_known_meanwhile(world: World, mount: Mount) -> None:
    """Who has the file open and knows the newer body does not keep the collector from the older one's blobs."""
    async with world.mount("b") as other:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"old" * 100)
        await file.commit()
        await other.volume.inner.lookup(1, b"f")
        theirs = await other.bodies.open(file.ino)
        await theirs.write(0, b"new" * 100)
        await theirs.commit()
        await mount.bodies.cache.settle()
        await mount.bodies.cache.make_room(1 << 40)

        async def refreshed_and_collected() -> None:
            world.blobs.before_read = None
            await file.refresh(await mount.volume.inner.getattr(file.ino))
            raise NoSuchBlob("collected")

        world.blobs.before_read = refreshed_and_collected
        assert await file.read(0, 1000) == b"new" * 100


async def test_a_blob_that_is_missing_for_good_is_an_error(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 100)
    await file.commit()
    await mount.bodies.cache.settle()
    await mount.bodies.cache.make_room(1 << 40)
    world.blobs.fail_reads = [NoSuchBlob("gone"), NoSuchBlob("gone")]
    with pytest.raises(MissingBlob):
        await file.read(0, 10)


# -- committing -------------------------------------------------------------------------------------------------------


async def test_bytes_written_during_an_upload_are_not_torn_into_it(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"1" * 1000)
    started, go_on = trio.Event(), trio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    world.blobs.before_put = wait
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.commit)
        await started.wait()
        await file.write(300, b"2" * 400)
        await file.append(b"3")
        assert await file.read(0, 2000) == b"1" * 300 + b"2" * 400 + b"1" * 300 + b"3"
        go_on.set()
    assert await mount.content(file.ino) == b"1" * 1000
    assert file.is_dirty
    assert await file.read(0, 2000) == b"1" * 300 + b"2" * 400 + b"1" * 300 + b"3"
    await file.commit()
    assert await mount.content(file.ino) == b"1" * 300 + b"2" * 400 + b"1" * 300 + b"3"


async def test_a_truncation_amid_an_upload_resurrects_nothing(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"1" * 1000)
    started = trio.Event()

    async def wait() -> None:
        started.set()
        await trio.sleep_forever()

    world.blobs.before_put = wait
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.commit)
        await started.wait()
        world.blobs.before_put = None
        await file.truncate(SetAttr(size_bytes=10))
        await file.truncate(SetAttr(size_bytes=800))
    assert await mount.content(file.ino) == b"1" * 10 + bytes(790)
    assert not file.is_dirty


async def test_a_truncation_waits_for_a_transaction(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"1" * 1000)
    started, go_on = trio.Event(), trio.Event()

    async def wait() -> None:
        started.set()
        await go_on.wait()

    mount.volume.before_commit = wait
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.commit)
        await started.wait()
        nursery.start_soon(file.truncate, SetAttr(size_bytes=5))
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert await mount.content(file.ino) == b"1" * 5


async def test_appends_of_two_mounts_all_stay(world: World, mount: Mount) -> None:
    async with world.mount("b") as other:
        mine = await mount.bodies.open(await mount.create())
        await mine.write(0, b"." * 100)
        await mine.commit()
        await other.volume.inner.lookup(1, b"f")
        theirs = await other.bodies.open(mine.ino)
        await mine.append(b"A" * 50)
        await theirs.append(b"B" * 30)
        await mine.commit()
        await theirs.commit()
        whole = b"." * 100 + b"A" * 50 + b"B" * 30
        assert await theirs.read(0, 1000) == whole
        await mine.append(b"C")
        await mine.refresh(await mount.volume.inner.getattr(mine.ino))
        assert await mine.read(0, 1000) == whole + b"C"
        await mine.commit()
        assert await other.content(mine.ino) == whole + b"C"


async def test_an_append_during_a_commit_that_moves_lands_behind_it(world: World, mount: Mount) -> None:
    async with world.mount("b") as other:
        mine = await mount.bodies.open(await mount.create())
        await mine.write(0, b"." * 100)
        await mine.commit()
        await other.volume.inner.lookup(1, b"f")
        theirs = await other.bodies.open(mine.ino)
        await theirs.append(b"B" * 30)
        await theirs.commit()
        await mine.append(b"A" * 50)

        async def append_more() -> None:
            mount.volume.before_commit = None
            await mine.append(b"C" * 5)

        mount.volume.before_commit = append_more
        await mine.commit()
        assert await mine.read(0, 1000) == b"." * 100 + b"B" * 30 + b"A" * 50 + b"C" * 5
        await mine.commit()
        assert await other.content(mine.ino) == b"." * 100 + b"B" * 30 + b"A" * 50 + b"C" * 5


@pytest.mark.parametrize("first", [b"a" * 10, b"a" * 1000])
async def test_mounts_that_both_begin_a_file_keep_both_ranges(world: World, mount: Mount, first: bytes) -> None:
    async with world.mount("b") as other:
        mine = await mount.bodies.open(await mount.create())
        await other.volume.inner.lookup(1, b"f")
        theirs = await other.bodies.open(mine.ino)
        await mine.write(0, first)
        await theirs.write(2000, b"b")
        await mine.commit()
        await theirs.commit()
        assert await mount.content(mine.ino) == first.ljust(2000, b"\0") + b"b"


async def test_an_upload_holds_only_so_many_blocks(world: World, tmp_path: Path) -> None:
    async with world.mount("few", uploads_max=3) as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, bytes(range(256)) * 40)

        async def linger() -> None:
            await trio.testing.wait_all_tasks_blocked()

        world.blobs.before_put = linger
        await file.commit()
        assert len(world.blobs.puts) == 40
        assert world.blobs.under_way_max == 3
        assert await mount.content(file.ino) == bytes(range(256)) * 40


async def test_a_file_in_too_many_pieces_is_rewritten(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_ops, "EXTENTS_MAX", 8)
    monkeypatch.setattr(plan, "RUNS_MAX", 4)
    file = await mount.bodies.open(await mount.create())
    expected = bytearray(3000)
    for index in range(20):
        expected[index * 150 : index * 150 + 70] = bytes([index + 1]) * 70
        await file.write(index * 150, bytes([index + 1]) * 70)
        await file.commit()
    assert await mount.content(file.ino) == expected[: 19 * 150 + 70]
    assert any(change.rewrites_all for change in mount.volume.commits)
    assert len((await mount.volume.read_body(file.ino)).inode.extents) <= 8


async def test_a_file_with_many_staged_stretches_is_committed_before_more(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_file, "SEGMENTS_MAX", 10)
    file = await mount.bodies.open(await mount.create())
    for index in range(25):
        await file.write(index * 10, b"x")
    assert len(mount.volume.commits) == 2
