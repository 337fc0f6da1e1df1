"""Taking over what other mounts commit into a working copy: interrupted, beside appends, and after a commit of unknown
outcome."""

from __future__ import annotations

import os
import random
from functools import partial

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.passed_file import PassedFile
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.records import SetAttr
from tests.support.bodies import BLOCK, Mount, World, mount, opened_there, world
from tests.support.collecting import as_others_read_it

__all__ = ["mount", "world"]
BASE = random.Random(1).randbytes(4 * BLOCK)


@pytest.fixture
async def file(mount: Mount) -> PassedFile:
    """Written by passthrough, and committed."""
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    assert os.pwrite(file.copy.fd, BASE, 0) == len(BASE)
    await file.commit()
    return file


async def taken_over_at_last(world: World, mount: Mount, file: PassedFile) -> None:
    """Take over what others have committed, interrupted at its first read, then at its second, and so on."""
    reads = 0

    async def fail_at(last: int) -> None:
        nonlocal reads
        reads += 1
        if reads == last:
            raise BlobStoreUnavailable("away")

    for last in range(1, 12):
        reads = 0
        world.blobs.before_read = partial(fail_at, last)
        try:
            await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
        except BodyUnavailable:
            continue
        break
    world.blobs.before_read = None
    assert last > 2, "it was never interrupted"


async def test_an_append_of_unknown_outcome_is_there_once(mount: Mount, file: PassedFile) -> None:
    await file.append(b"once;")
    mount.volume.faults = ["applied"]
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))  # as a stat does
    assert bytes(await file.read(0, 1 << 20)) == BASE + b"once;"
    await file.commit()
    assert await mount.content(file.ino) == BASE + b"once;"


async def test_an_append_of_unknown_outcome_that_another_follows(world: World, mount: Mount, file: PassedFile) -> None:
    await file.append(b"ours")
    mount.volume.faults = ["applied"]
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.append(b"theirs")
        await there.commit()
    await file.append(b"more")
    await file.commit()
    assert await mount.content(file.ino) == BASE + b"ourstheirsmore"


async def test_taking_over_goes_on_where_it_was_interrupted(world: World, mount: Mount, file: PassedFile) -> None:
    async with world.mount("other") as other:
        there = await opened_there(other)
        for number, data in ((0, b"VERSION1"), (2, b"Z")):
            await there.write(number * BLOCK, data)
        await there.append(b"theirs")
        await there.commit()
        await file.append(b"ours")
        await taken_over_at_last(world, mount, file)
        await there.write(0, b"VERSION2")
        await there.commit()
        os.pwrite(file.copy.fd, b"mine", 3 * BLOCK)
        await file.commit()
        expected = bytearray(BASE)
        expected[:8], expected[2 * BLOCK : 2 * BLOCK + 1], expected[3 * BLOCK : 3 * BLOCK + 4] = (
            b"VERSION2",
            b"Z",
            b"mine",
        )
        assert await mount.content(file.ino) == bytes(expected) + b"theirsours"


async def test_an_append_waits_for_what_is_being_taken_over(world: World, mount: Mount, file: PassedFile) -> None:
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.write(0, b"X")
        await there.commit()
        entered, go_on = trio.Event(), trio.Event()

        async def wait() -> None:
            entered.set()
            await go_on.wait()

        world.blobs.before_read = wait
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.bodies.refresh, file, await mount.volume.inner.getattr(file.ino))
            await entered.wait()
            nursery.start_soon(file.append, b"ours")
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        world.blobs.before_read = None
        await there.append(b"theirs")
        await there.commit()
        await file.commit()
    assert (await mount.content(file.ino))[4 * BLOCK :] == b"theirsours"


async def cut_elsewhere(world: World, size: int) -> None:
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.truncate(SetAttr(size_bytes=size))
        other.bodies.release(there)


@pytest.mark.parametrize("size", [0, BLOCK, BLOCK + 100, 4 * BLOCK - 1])
async def test_what_others_have_cut_does_not_come_back_with_what_is_added(
    world: World, file: PassedFile, size: int
) -> None:
    """As where a log is copied and cut while its writer, who knows where it was, goes on."""
    os.pwrite(file.copy.fd, b"more" * 1000, len(BASE))
    await cut_elsewhere(world, size)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == BASE[:size].ljust(len(BASE), b"\0") + b"more" * 1000


@pytest.mark.parametrize("size", [0, BLOCK, BLOCK + 100])
async def test_what_was_written_past_a_cut_elsewhere_stays(world: World, file: PassedFile, size: int) -> None:
    await cut_elsewhere(world, size)
    os.pwrite(file.copy.fd, b"written later", 2 * BLOCK + 7)
    await file.commit()
    expected = BASE[:size].ljust(2 * BLOCK + 7, b"\0") + b"written later"
    assert await as_others_read_it(world, file.ino) == expected
    assert file.size_bytes == len(expected)


async def test_what_nobody_has_written_since_is_cut_without_being_read(
    world: World, mount: Mount, file: PassedFile
) -> None:
    while not file._is_clean(file.copy.moment()):  # not before the clock of the disk has moved on
        await trio.testing.wait_all_tasks_blocked(0.01)
    await cut_elsewhere(world, 3 * BLOCK)
    reads = len(world.blobs.reads)
    await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
    assert (file.size_bytes, len(world.blobs.reads)) == (3 * BLOCK, reads)
    await cut_elsewhere(world, 0)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == b""


@pytest.mark.parametrize("size", [0, BLOCK + 100])
async def test_what_is_appended_follows_the_end_to_which_others_have_cut(
    world: World, file: PassedFile, size: int
) -> None:
    appended = random.Random(2).randbytes(2 * BLOCK + 11)
    await file.append(appended)
    await cut_elsewhere(world, size)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == BASE[:size] + appended
    await file.append(b"next")
    await file.commit()
    assert await as_others_read_it(world, file.ino) == BASE[:size] + appended + b"next"


async def test_a_cut_that_is_taken_over_goes_on_where_it_was_interrupted(
    world: World, mount: Mount, file: PassedFile
) -> None:
    await cut_elsewhere(world, BLOCK // 2)
    os.pwrite(file.copy.fd, b"here", BLOCK + 8)
    os.pwrite(file.copy.fd, b"there", 3 * BLOCK - 10)
    await taken_over_at_last(world, mount, file)
    await file.commit()
    expected = bytearray(3 * BLOCK - 5)
    expected[: BLOCK // 2] = BASE[: BLOCK // 2]
    expected[BLOCK + 8 : BLOCK + 12], expected[3 * BLOCK - 10 :] = b"here", b"there"
    assert await as_others_read_it(world, file.ino) == bytes(expected)


async def test_what_was_written_into_a_hole_past_a_cut_elsewhere_stays(world: World, mount: Mount) -> None:
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    os.pwrite(file.copy.fd, BASE[:BLOCK], 0)
    os.ftruncate(file.copy.fd, 8 * BLOCK)
    await file.commit()
    await cut_elsewhere(world, 2 * BLOCK)
    os.pwrite(file.copy.fd, b"written later", 4 * BLOCK + 7)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == BASE[:BLOCK].ljust(4 * BLOCK + 7, b"\0") + b"written later"


async def test_what_was_written_after_a_take_over_that_failed_stays(world: World, mount: Mount) -> None:
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.write(0, b"theirs" * 2000)
        await there.commit()

        async def fail() -> None:
            raise BlobStoreUnavailable("away")

        world.blobs.before_read = fail
        with pytest.raises(BodyUnavailable):
            await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
        world.blobs.before_read = None
        os.pwrite(file.copy.fd, b"mine", 5000)
        await there.truncate(SetAttr(size_bytes=100))
        await file.commit()
    assert await as_others_read_it(world, file.ino) == (b"theirs" * 17)[:100].ljust(5000, b"\0") + b"mine"


async def test_an_inline_body_that_is_taken_over_is_stored(world: World, mount: Mount) -> None:
    """Another mount has written a header and made room; here a range is written."""
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.write(0, b"the header")
        await there.truncate(SetAttr(size_bytes=16 * BLOCK))
        await there.commit()
        os.pwrite(file.copy.fd, b"x" * BLOCK, 8 * BLOCK)
        await file.commit()
    expected = bytearray(16 * BLOCK)
    expected[:10], expected[8 * BLOCK : 9 * BLOCK] = b"the header", b"x" * BLOCK
    assert await as_others_read_it(world, file.ino) == bytes(expected)


@pytest.mark.parametrize("elsewhere", ["cut", "overwritten"])
async def test_what_is_stored_ahead_during_a_commit_is_in_no_blob_of_that(
    world: World, file: PassedFile, elsewhere: str
) -> None:
    """Others drop what the commit has laid down: its blobs are garbage then, as a whole."""
    first, late = random.Random(6).randbytes(3 * BLOCK), random.Random(7).randbytes(2 * BLOCK)
    await file.truncate(SetAttr(size_bytes=0))
    os.pwrite(file.copy.fd, first, 0)

    async def go_on() -> None:
        world.blobs.before_put = None
        os.pwrite(file.copy.fd, late, 3 * BLOCK)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                for upload in await file.ready_uploads():
                    nursery.start_soon(upload)

    world.blobs.before_put = go_on
    await file.commit()
    if elsewhere == "cut":
        await cut_elsewhere(world, 0)
        expected = bytes(3 * BLOCK)
    else:
        expected = random.Random(8).randbytes(3 * BLOCK)
        async with world.mount("other") as other:
            there = await opened_there(other)
            await there.write(0, expected)
            await there.commit()
            other.bodies.release(there)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == expected + late


async def test_a_block_on_its_way_while_the_file_is_cut_is_not_referred_to(world: World, file: PassedFile) -> None:
    """The same bytes are written again after that."""
    data = random.Random(9).randbytes(5 * BLOCK)
    await file.truncate(SetAttr(size_bytes=0))
    os.pwrite(file.copy.fd, data[: 3 * BLOCK], 0)
    go_on = trio.Event()

    async def wait() -> None:
        if int(world.blobs.puts[-1].rpartition("/")[2], 16) >= 3:
            await go_on.wait()

    os.pwrite(file.copy.fd, data[3 * BLOCK :], 3 * BLOCK)
    world.blobs.before_put = wait
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            for upload in await file.ready_uploads():
                nursery.start_soon(upload)
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.ftruncate(file.copy.fd, 3 * BLOCK)
        await file.commit()
        await file.truncate(SetAttr(size_bytes=0))
        go_on.set()
    world.blobs.before_put = None
    os.pwrite(file.copy.fd, data, 0)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == data
