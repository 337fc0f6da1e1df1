"""One open file on one mount: what is read back, what is committed, and what happens when something fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreFull, BlobStoreRefused, NoSuchBlob
from apollofs.fs import open_file, plan
from apollofs.fs.errors import BodyLost, BodyUnavailable, MissingBlob, NoDataThere
from apollofs.metadata.errors import FileTooLarge, InvalidArgument, OutcomeUnknown
from apollofs.metadata.ops import body as body_ops
from apollofs.metadata.records import FILE_BYTES_MAX, SetAttr
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


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_staged_bytes_are_read_over_stored_ones_and_holes(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(100, b"a" * 1000)
    await file.commit()
    await file.write(50, b"b" * 100)
    await file.write(2000, b"c")
    assert await file.read(0, 5000) == bytes(50) + b"b" * 100 + b"a" * 950 + bytes(900) + b"c"
    assert file.seek_data(0) == 50
    assert file.seek_hole(50) == 1100
    assert file.seek_data(1100) == 2000
    assert file.seek_hole(2000) == 2001
    assert file.allocated_bytes == 1051
    with pytest.raises(NoDataThere):
        file.seek_data(2001)
    with pytest.raises(NoDataThere):
        file.seek_hole(2001)


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
    await file.expect_mtime(12345)
    file.adopt(await mount.volume.setattr(file.ino, SetAttr(mtime_ns=12345)))
    await file.commit()
    assert (await mount.volume.inner.getattr(file.ino)).mtime_ns == 12345


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
        await mount.bodies.cache.make_room(1 << 40)
        assert await file.read(0, 1000) == b"new" * 100


async def test_a_blob_that_is_missing_for_good_is_an_error(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 100)
    await file.commit()
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


async def test_a_file_in_too_many_pieces_is_rewritten(
    world: World, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# -- failing ----------------------------------------------------------------------------------------------------------


async def test_a_failed_commit_leaves_everything_for_the_next(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 1000)
    world.blobs.fail_puts = [BlobStoreRefused("no")]
    with pytest.raises(BodyUnavailable):
        await file.commit()
    assert file.is_dirty
    await file.commit()
    assert await mount.content(file.ino) == b"x" * 1000


async def test_a_full_store_is_said_to_be_full(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 1000)
    world.blobs.fail_puts = [BlobStoreFull("full")]
    with pytest.raises(BlobStoreFull):
        await file.commit()


async def test_a_commit_has_a_deadline(world: World, mock_clock: trio.testing.MockClock) -> None:
    async with world.mount("slow", commit_deadline_s=2.0) as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"x" * 1000)

        async def expire() -> None:
            mock_clock.jump(2.1)
            await trio.sleep_forever()

        world.blobs.before_put = expire
        with pytest.raises(BodyUnavailable):
            await file.commit()
        world.blobs.before_put = None
        await file.commit()
        assert await mount.content(file.ino) == b"x" * 1000


@pytest.mark.parametrize("fault", ["lost", "applied"])
async def test_an_append_whose_commit_got_no_answer_happens_once(mount: Mount, fault: str) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.append(b"a" * 200)
    await file.commit()
    mount.volume.faults = [fault]
    await file.append(b"b" * 50)
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    await file.append(b"c")
    await file.commit()
    assert await mount.content(file.ino) == b"a" * 200 + b"b" * 50 + b"c"


async def test_a_cancelled_commit_can_be_repeated(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.append(b"x" * 1000)
    for hook in ("put", "commit"):
        with trio.CancelScope() as scope:

            async def cancel(scope: trio.CancelScope = scope) -> None:
                scope.cancel()
                await trio.lowlevel.checkpoint()

            world.blobs.before_put = cancel if hook == "put" else None
            mount.volume.before_commit = cancel if hook == "commit" else None
            await file.commit()
        assert scope.cancelled_caught
    mount.volume.before_commit = None
    await file.commit()
    assert await mount.content(file.ino) == b"x" * 1000


async def test_a_lost_session_drops_what_is_dirty_and_tells_each_handle_once(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"kept")
    await file.commit()
    one, two, clean = file.errors.cursor(), file.errors.cursor(), await mount.bodies.open(await mount.create(b"g"))
    await file.write(0, b"lost")
    mount.bodies.session_lost()
    with pytest.raises(BodyLost):
        await file.write(0, b"more", one)
    with pytest.raises(BodyLost):
        await file.commit(two)
    await file.write(4, b"!", one)
    await file.commit(two)
    assert await mount.content(file.ino) == b"kept!"
    await clean.commit(clean.errors.cursor())


async def test_a_session_that_is_lost_amid_a_commit(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    cursor = file.errors.cursor()
    await file.append(b"x" * 1000, cursor)

    async def lose() -> None:
        world.blobs.before_put = None
        mount.bodies.session_lost()

    world.blobs.before_put = lose
    with pytest.raises(BodyLost):
        await file.commit(cursor)
    await file.commit(cursor)
    assert file.size_bytes == 0
    await file.append(b"y", cursor)
    await file.commit(cursor)
    assert await mount.content(file.ino) == b"y"


# -- orphans ----------------------------------------------------------------------------------------------------------


async def test_an_orphan_lives_on_here_and_commits_nothing(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"a" * 500)
    await file.commit()
    await mount.volume.inner.unlink(1, b"f")
    file.orphan()
    commits = len(mount.volume.commits)
    await file.write(400, b"b" * 200)
    await file.append(b"c")
    await file.truncate(SetAttr(size_bytes=590))
    await file.punch(10, 480, keep_size=True)
    await file.grow(700)
    await file.commit()
    assert await file.read(0, 1000) == b"a" * 10 + bytes(480) + b"b" * 100 + bytes(110)
    assert not file.is_dirty
    assert len(mount.volume.commits) == commits


async def test_a_file_that_was_unlinked_elsewhere_becomes_an_orphan(world: World, mount: Mount) -> None:
    async with world.mount("b") as other:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"a" * 500)
        await other.volume.inner.unlink(1, b"f")
        await file.commit()
        assert file.orphaned
        await file.truncate(SetAttr(size_bytes=3))
        assert await file.read(0, 1000) == b"aaa"


async def test_sizes_past_the_largest_are_refused(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    with pytest.raises(FileTooLarge):
        await file.write(FILE_BYTES_MAX, b"x")
    with pytest.raises(FileTooLarge):
        await file.grow(FILE_BYTES_MAX + 1)
    with pytest.raises(FileTooLarge):
        await file.punch(FILE_BYTES_MAX, 1, keep_size=False)
    with pytest.raises(InvalidArgument):
        await file.punch(0, 0, keep_size=True)
    await file.write(FILE_BYTES_MAX - 1, b"x")
    await file.commit()
    assert (await mount.volume.inner.getattr(file.ino)).size_bytes == FILE_BYTES_MAX
