"""Taking over into a working copy while processes write to it, others go on, and requests fail in between."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest
import trio

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.metadata.errors import OutcomeUnknown, StoreFull, StoreUnavailable
from apollofs.metadata.records import Body, BodyChange, Inode, SetAttr
from tests.support.bodies import BLOCK, Mount, World, mount, opened_there, world

__all__ = ["mount", "world"]
MINE = b"MINE" * 50


@pytest.fixture
async def other(world: World) -> AsyncIterator[Mount]:
    async with world.mount("other") as made:
        yield made


async def passed(mount: Mount, size: int) -> PassedFile:
    """Written by passthrough with bytes "a", and committed."""
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    os.pwrite(file.copy.fd, b"a" * size, 0)
    await file.commit()
    return file


async def write_there(there: OpenFile, offset: int, data: bytes) -> None:
    await there.write(offset, data)
    await there.commit()


async def refresh(mount: Mount, file: OpenFile) -> None:
    await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))


def bytes_by_blob(change: BodyChange) -> Counter[int]:
    """How many bytes of each blob a change refers to."""
    found = Counter[int]()
    for extent in change.extents:
        found[extent.blob] += extent.length
    return found


async def test_what_is_written_behind_the_end_meanwhile_stays(world: World, mount: Mount, other: Mount) -> None:
    file = await passed(mount, 5 * BLOCK)
    await write_there(await opened_there(other), 0, b"theirs")

    async def grow() -> None:
        world.blobs.before_read = None
        os.pwrite(file.copy.fd, MINE, 5 * BLOCK)

    world.blobs.before_read = grow
    await refresh(mount, file)
    await file.commit()
    expected = b"theirs" + b"a" * (5 * BLOCK - 6) + MINE
    assert await mount.content(file.ino) == expected


async def test_what_is_written_past_a_cut_meanwhile_stays(world: World, mount: Mount, other: Mount) -> None:
    file = await passed(mount, 5 * BLOCK)
    os.pwrite(file.copy.fd, b"x", 100)
    await (await opened_there(other)).truncate(SetAttr(size_bytes=BLOCK + 10))
    reads = 0

    async def write_at_the_fifth() -> None:
        nonlocal reads
        reads += 1
        if reads == 5:
            os.pwrite(file.copy.fd, MINE, 2 * BLOCK)

    world.blobs.before_read = write_at_the_fifth
    await refresh(mount, file)
    world.blobs.before_read = None
    await file.commit()
    found = await mount.content(file.ino)
    assert reads >= 5 and found[BLOCK + 10 :] == bytes(BLOCK - 10) + MINE


async def test_what_is_written_behind_an_append_that_moves_stays(
    mount: Mount, other: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have cut the file, and what was appended here follows its end."""
    file = await passed(mount, 2 * BLOCK)
    await file.append(b"P" * (3 * BLOCK))
    await (await opened_there(other)).truncate(SetAttr(size_bytes=100))
    write, written = file.copy.write, False

    async def write_after_another(offset: int, data: bytes | bytearray) -> None:
        nonlocal written
        if not written and data[:1] == b"P":
            written = True
            os.pwrite(file.copy.fd, MINE, 5 * BLOCK + 100)
        await write(offset, data)

    monkeypatch.setattr(file.copy, "write", write_after_another)
    await file.commit()
    assert written and await mount.content(file.ino) == b"a" * 100 + b"P" * (3 * BLOCK) + bytes(100) + MINE


async def test_what_others_write_between_the_two_requests_of_a_truncation_stays(
    mount: Mount, other: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, there = await passed(mount, BLOCK + 100), await opened_there(other)
    await write_there(there, 0, b"x")
    read_body = mount.volume.read_body

    async def read_after_another(ino: int) -> Body:
        monkeypatch.setattr(mount.volume, "read_body", read_body)
        await refresh(other, there)
        await write_there(there, BLOCK + 1, b"t" * 99)
        return await read_body(ino)

    monkeypatch.setattr(mount.volume, "read_body", read_after_another)
    await file.truncate(SetAttr(size_bytes=BLOCK + 1))
    expected = b"x" + b"a" * BLOCK + b"t" * 99
    assert bytes(await file.read(0, 1 << 20)) == expected
    await file.commit()
    assert await mount.content(file.ino) == expected


async def test_what_others_write_after_a_cut_whose_taking_over_failed_stays(
    world: World, mount: Mount, other: Mount
) -> None:
    file, there = await passed(mount, BLOCK + 100), await opened_there(other)
    await write_there(there, 0, b"x")
    await there.truncate(SetAttr(size_bytes=BLOCK + 1))

    async def fail() -> None:
        raise BlobStoreUnavailable("away")

    world.blobs.before_read = fail
    with pytest.raises(BodyUnavailable):
        await refresh(mount, file)
    world.blobs.before_read = None
    await write_there(there, BLOCK + 1, b"t" * 99)
    await refresh(mount, file)
    expected = b"x" + b"a" * BLOCK + b"t" * 99
    assert bytes(await file.read(0, 1 << 20)) == expected
    await file.commit()
    assert await mount.content(file.ino) == expected


async def test_a_truncation_whose_second_request_fails_leaves_no_append_behind(
    mount: Mount, other: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await passed(mount, 2 * BLOCK)
    await file.append(b"appended")
    await write_there(await opened_there(other), 0, b"theirs")
    read_body = mount.volume.read_body

    async def fail(ino: int) -> Body:
        monkeypatch.setattr(mount.volume, "read_body", read_body)
        raise StoreUnavailable("away")

    monkeypatch.setattr(mount.volume, "read_body", fail)
    with pytest.raises(StoreUnavailable):
        await file.truncate(SetAttr(size_bytes=BLOCK))
    await file.commit()
    assert await mount.content(file.ino) == b"theirs" + b"a" * (BLOCK - 6)


async def test_a_truncation_that_is_refused_changes_nothing_here(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await passed(mount, 2 * BLOCK)

    async def refuse(ino: int, change: SetAttr) -> Inode:
        raise StoreFull("no space")

    with monkeypatch.context() as patched:
        patched.setattr(mount.volume, "setattr", refuse)
        with pytest.raises(StoreFull):
            await file.truncate(SetAttr(size_bytes=10 * BLOCK))
    await file.commit()
    assert await mount.content(file.ino) == b"a" * (2 * BLOCK)


async def test_a_blob_of_one_commit_is_of_no_later_one(world: World, mount: Mount) -> None:
    """Copies at other sites are asked for when a commit refers to a blob for the first time."""
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    os.pwrite(file.copy.fd, os.urandom(40 * BLOCK), 0)

    async def go_on() -> None:
        world.blobs.before_put = None
        os.pwrite(file.copy.fd, os.urandom(8 * BLOCK), 40 * BLOCK)
        for _ in range(12):
            async with trio.open_nursery() as nursery:
                for upload in await file.ready_uploads():
                    nursery.start_soon(upload)

    world.blobs.before_put = go_on
    await file.commit()
    await file.commit()
    first, second = (bytes_by_blob(change) for change in mount.volume.commits)
    assert sum(second.values()) == 48 * BLOCK
    assert {blob: length for blob, length in second.items() if blob in first} == first


@pytest.mark.parametrize("fault", ["", "applied"])
async def test_what_is_appended_through_the_daemon_follows_a_cut_elsewhere(
    mount: Mount, other: Mount, fault: str
) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.append(b"0" * 100)
    await file.commit()
    there = await opened_there(other)
    await file.append(b"A" * 100)
    mount.volume.faults = [fault]
    with pytest.raises(OutcomeUnknown) if fault else nullcontext():
        await file.commit()
    await file.append(b"B" * 100)
    await refresh(other, there)
    await there.truncate(SetAttr(size_bytes=50))
    await file.commit()
    assert await mount.content(file.ino) == b"0" * 50 + b"B" * 100
