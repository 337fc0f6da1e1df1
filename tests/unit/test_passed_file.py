"""Files that are written past the daemon: what is committed of a working copy, while others change the file too."""

from __future__ import annotations

import os
import random

import pytest
import trio

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.errors import BodyLost, BodyUnavailable, NoDataThere
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.metadata.errors import OutcomeUnknown, StoreUnavailable
from apollofs.metadata.records import ROOT_INO, SetAttr
from tests.support.bodies import BLOCK, Mount, World, mount, opened_there, world

__all__ = ["mount", "world"]


async def passed(mount: Mount, ino: int) -> PassedFile:
    """The file, opened for writing by passthrough."""
    return mount.bodies.pass_through(await mount.bodies.open(ino))


def kernel_writes(file: PassedFile, offset: int, data: bytes) -> None:
    assert os.pwrite(file.copy.fd, data, offset) == len(data)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def until_forgotten(mount: Mount, ino: int) -> None:
    with trio.fail_after(60):
        while True:
            if mount.bodies.find(ino) is None:
                return
            await trio.sleep(0.01)


async def store_ready(file: PassedFile) -> int:
    """One poll of the uploader; how many blocks it stored."""
    uploads = await file.ready_uploads()
    for upload in uploads:
        await upload()
    return len(uploads)


async def test_what_the_kernel_wrote_is_committed_as_one_extent(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = noise(1, 10 * BLOCK + 100)
    kernel_writes(file, 0, data)
    assert file.size_bytes == len(data)
    assert mount.bodies.dirty_files == [file]
    await file.commit()
    assert mount.bodies.dirty_files == []
    body = await mount.volume.read_body(file.ino)
    assert len(body.inode.extents) == 1
    assert body.inode.mtime_ns == file.copy.moment().mtime_ns
    assert len(world.blobs.puts) == 11
    assert await mount.content(file.ino) == data
    await file.commit()
    assert len(mount.volume.commits) == 1


async def test_a_small_file_goes_inline_and_grows_out_of_it(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, b"small")
    await file.commit()
    assert world.blobs.puts == []
    assert await mount.content(file.ino) == b"small"
    kernel_writes(file, 5, b"!" * 100)
    await file.commit()
    assert await mount.content(file.ino) == b"small" + b"!" * 100
    assert len(world.blobs.puts) == 1


async def test_an_empty_file_costs_no_commit(mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    assert not file.is_dirty
    await file.commit()
    assert mount.volume.commits == []


async def test_blocks_behind_the_front_are_stored_ahead_and_only_once(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = noise(2, 4 * BLOCK + 10)
    kernel_writes(file, 0, data)
    assert await store_ready(file) == 0, "a block that was just seen for the first time may be written still"
    assert await store_ready(file) == 4
    assert await store_ready(file) == 0
    await file.commit()
    assert len(world.blobs.puts) == 5
    body = await mount.volume.read_body(file.ino)
    assert len(body.inode.extents) == 1
    assert await mount.content(file.ino) == data


async def test_a_block_that_was_rewritten_since_is_stored_anew(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = bytearray(noise(3, 4 * BLOCK))
    kernel_writes(file, 0, bytes(data))
    await store_ready(file)
    await store_ready(file)
    data[BLOCK + 5 : BLOCK + 8] = b"new"
    kernel_writes(file, BLOCK + 5, b"new")
    await file.commit()
    assert len(world.blobs.puts) == 5
    assert len(set(world.blobs.puts)) == 5, "the name of an object is never used again"
    assert await mount.content(file.ino) == data


async def test_holes_stay_holes(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 8 * BLOCK, b"end")
    assert await file.seek_data(0) == 8 * BLOCK
    assert await file.seek_hole(0) == 0
    with pytest.raises(NoDataThere):
        await file.seek_data(9 * BLOCK)
    await file.commit()
    assert len(world.blobs.puts) == 1
    assert await mount.content(file.ino) == bytes(8 * BLOCK) + b"end"
    await file.punch(8 * BLOCK, 2, keep_size=True)
    assert await mount.content(file.ino) == bytes(8 * BLOCK + 2) + b"d"


async def test_a_log_that_is_synced_again_and_again(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    whole = b""
    for number in range(20):
        line = noise(number, 1000)
        kernel_writes(file, len(whole), line)
        whole += line
        await file.commit()
        assert await mount.content(file.ino) == whole
    assert len(world.blobs.puts) <= 20 + 20 * 1000 // BLOCK


async def test_truncation_takes_away_what_was_stored_ahead(mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, noise(4, 4 * BLOCK))
    await store_ready(file)
    await store_ready(file)
    inode = await file.truncate(SetAttr(size_bytes=BLOCK + 7))
    assert inode.size_bytes == BLOCK + 7
    assert (await mount.volume.read_body(file.ino)).inode.size_bytes == BLOCK + 7
    await file.truncate(SetAttr(size_bytes=3 * BLOCK))
    await file.commit()
    assert await mount.content(file.ino) == noise(4, 4 * BLOCK)[: BLOCK + 7] + bytes(2 * BLOCK - 7)


# -- others -----------------------------------------------------------------------------------------------------------


async def test_what_two_mounts_wrote_in_different_places_is_kept(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = bytearray(noise(5, 6 * BLOCK))
    kernel_writes(file, 0, bytes(data))
    await file.commit()
    async with world.mount("b") as other:
        there = await opened_there(other)
        await there.write(10, b"there")
        await there.write(7 * BLOCK, b"end")
        await there.commit()
        kernel_writes(file, 20, b"here")
        await file.commit()
        data[10:15], data[20:24] = b"there", b"here"
        expected = bytes(data).ljust(7 * BLOCK, b"\0") + b"end"
        assert await other.content(file.ino) == expected
        assert os.pread(file.copy.fd, 8 * BLOCK, 0) == expected


async def test_a_change_elsewhere_reaches_a_file_that_is_not_being_written(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, noise(6, 3 * BLOCK))
    await file.commit()
    async with world.mount("b") as other:
        there = await opened_there(other)
        await there.write(BLOCK, b"new")
        await there.commit()
        await there.truncate(SetAttr(size_bytes=BLOCK + 3))
    await file.refresh(await mount.volume.inner.getattr(file.ino))
    assert os.pread(file.copy.fd, 4 * BLOCK, 0) == noise(6, 3 * BLOCK)[:BLOCK] + b"new"
    await file.commit()
    assert await mount.content(file.ino) == noise(6, 3 * BLOCK)[:BLOCK] + b"new"


async def test_a_file_is_closed_while_a_change_elsewhere_is_fetched(world: World, mount: Mount) -> None:
    """Whoever has it brought up to date without a handle of his own finds it whole to the end."""
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, noise(6, 3 * BLOCK))
    await file.commit()
    async with world.mount("b") as other:
        there = await opened_there(other)
        await there.write(BLOCK, b"new")
        await there.commit()

    async def close() -> None:
        world.blobs.before_read = None
        mount.bodies.release(file)
        await trio.lowlevel.checkpoint()

    world.blobs.before_read = close
    with mount.bodies.held(file.ino) as held:
        assert held is file
        await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
        assert mount.bodies.opens(file.ino) == 0
        assert os.pread(file.copy.fd, 3, BLOCK) == b"new"
        assert file.shown[0] == 3 * BLOCK
    await until_forgotten(mount, file.ino)


async def test_a_change_elsewhere_is_seen_amid_writing_and_is_not_committed_again(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = bytearray(noise(6, 5 * BLOCK))
    kernel_writes(file, 0, bytes(data))
    await file.commit()
    async with world.mount("b") as other:
        there = await opened_there(other)
        await there.write(10, b"there")
        await there.write(3 * BLOCK, b"there too")
        await there.commit()
        data[10:15], data[3 * BLOCK : 3 * BLOCK + 9] = b"there", b"there too"
        await file.refresh(await mount.volume.inner.getattr(file.ino))
        assert await file.read(0, len(data)) == data
        commits = len(mount.volume.commits)
        await file.commit()
        assert len(mount.volume.commits) == commits
        assert file.inode.mtime_ns == there.inode.mtime_ns
        kernel_writes(file, 20, b"here")
        await there.write(2 * BLOCK, b"again")
        await there.commit()
        data[20:24], data[2 * BLOCK : 2 * BLOCK + 5] = b"here", b"again"
        await file.refresh(await mount.volume.inner.getattr(file.ino))
        assert await file.read(0, len(data)) == data
        puts = len(world.blobs.puts)
        await file.commit()
        assert len(world.blobs.puts) == puts + 1
        assert await other.content(file.ino) == data


async def test_appends_from_two_mounts_all_stay(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    async with world.mount("b") as other:
        there = await opened_there(other)
        for number in range(10):
            await file.append(b"here %4d\n" % number)
            await there.append(b"there%4d\n" % number)
            await there.commit()
            await file.commit()
            await there.refresh((await other.volume.read_body(file.ino)).inode)
    lines = (await mount.content(file.ino)).splitlines()
    assert len(lines) == 20
    assert [line for line in lines if line.startswith(b"here")] == [b"here %4d" % number for number in range(10)]
    assert [line for line in lines if line.startswith(b"there")] == [b"there%4d" % number for number in range(10)]


async def test_a_removed_file_lives_on_here(mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, b"before")
    await mount.volume.inner.unlink(ROOT_INO, b"f")
    await file.commit()
    assert file.orphaned
    kernel_writes(file, 6, b" after")
    await file.commit()
    assert await file.read(0, 100) == b"before after"
    assert not file.is_dirty


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_an_upload_that_fails_is_told_and_tried_again(world: World, mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    data = noise(7, 3 * BLOCK)
    kernel_writes(file, 0, data)
    world.blobs.fail_puts = [BlobStoreUnavailable("by the test")]
    with pytest.raises(BodyUnavailable):
        await file.commit()
    assert file.is_dirty
    await file.commit()
    assert await mount.content(file.ino) == data


@pytest.mark.parametrize("fault", ["refused", "lost", "applied"])
async def test_a_commit_of_unknown_outcome_is_settled(mount: Mount, fault: str) -> None:
    file = await passed(mount, await mount.create())
    data = noise(8, 2 * BLOCK)
    kernel_writes(file, 0, data)
    mount.volume.faults = [fault]
    with pytest.raises((StoreUnavailable, OutcomeUnknown)):
        await file.commit()
    assert file.is_dirty
    kernel_writes(file, 5, b"more")
    await file.commit()
    assert await mount.content(file.ino) == data[:5] + b"more" + data[9:]
    assert not file.is_dirty


async def test_what_was_not_committed_is_lost_with_the_session_and_every_sync_says_so(
    world: World, mount: Mount
) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, noise(9, 2 * BLOCK))
    await file.commit()
    cursor = file.errors.cursor()
    kernel_writes(file, 0, b"lost")
    file.session_lost()
    for _ in range(3):
        with pytest.raises(BodyLost):
            await file.commit(cursor)
    with pytest.raises(BodyLost):
        file.check_usable()
    assert await mount.content(file.ino) == noise(9, 2 * BLOCK)
    path = trio.Path(file.copy.path)
    mount.bodies.release(file)
    assert mount.bodies.find(file.ino) is None
    assert (await path.read_bytes())[:4] == b"lost", "it can be recovered by hand"


async def test_a_copy_that_is_still_mapped_is_kept_until_it_is_not(mount: Mount) -> None:
    file = await passed(mount, await mount.create())
    kernel_writes(file, 0, b"before")
    mapped = os.open(file.copy.path, os.O_RDWR)
    await file.commit()
    mount.bodies.release(file)
    assert mount.bodies.find(file.ino) is file
    os.pwrite(mapped, b"after!", 0)
    await mount.bodies.commit_all()
    assert mount.bodies.find(file.ino) is file
    os.close(mapped)
    await until_forgotten(mount, file.ino)
    assert await mount.content(file.ino) == b"after!"
    assert not await trio.Path(file.copy.path).exists()


async def test_random_writes_past_and_through_the_daemon_and_elsewhere(world: World, mount: Mount) -> None:
    """Each mount writes bytes of its own (even and odd offsets): all are kept."""
    for seed in range(6):
        rng = random.Random(seed)
        ino = await mount.create(b"random%d" % seed)
        file = await passed(mount, ino)
        expected = bytearray()
        kernel_writes(file, 0, bytes(8 * BLOCK))
        expected[:] = bytes(8 * BLOCK)
        await file.commit()
        async with world.mount("b") as other:
            there = await opened_there(other, b"random%d" % seed)
            for step in range(60):
                await _random_step(rng, step, file, there, expected)
            await there.commit()
            await file.commit()
            assert await other.content(ino) == bytes(expected)
            other.bodies.release(there)
        mount.bodies.release(file)


async def _random_step(rng: random.Random, step: int, file: PassedFile, there: OpenFile, expected: bytearray) -> None:
    kind = rng.randrange(6)
    offset = rng.randrange(len(expected) // 2) * 2
    value = bytes([step + 1])
    if kind == 0:
        kernel_writes(file, offset, value)
        expected[offset : offset + 1] = value
    elif kind == 1:
        await file.write(offset, value)
        expected[offset : offset + 1] = value
    elif kind == 2:
        await there.write(offset + 1, value)
        expected[offset + 1 : offset + 2] = value
    elif kind == 3:
        await there.commit()
    elif kind == 4:
        await file.commit()
    else:
        await store_ready(file)
