"""copy_file_range between open files: what is shared, what is copied, and that neither file changes the other."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from apollofs.fs import copying
from apollofs.fs.copying import copy_range
from apollofs.fs.handles import FileHandle
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.errors import OutcomeUnknown, StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, SetAttr
from apollofs.metadata.store import Range, prefix_end
from tests.support.bodies import Mount, World, body_world
from tests.support.volumes import VOLUME, assert_sound

KEYS = Keys(VOLUME)
LARGE = random.Random(3).randbytes(5000)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made
        await assert_sound(made.store)


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made


@pytest.fixture
async def other(world: World) -> AsyncIterator[Mount]:
    async with world.mount("b") as made:
        yield made


async def saved(mount: Mount, name: bytes, *pieces: tuple[int, bytes]) -> OpenFile:
    """An open file, each piece (offset, bytes) of which was committed for itself, and so has a blob of its own."""
    file = await mount.bodies.open(await mount.create(name))
    for offset, data in pieces:
        await file.write(offset, data)
        await file.commit()
    return file


def handle(file: OpenFile) -> FileHandle:
    return FileHandle(file, os.O_RDWR, 0, file.errors.cursor())


async def copied(
    mount: Mount, source: OpenFile, target: OpenFile, offset_in: int = 0, offset_out: int = 0, length: int = 1 << 40
) -> int:
    async def refresh(file: OpenFile) -> None:
        try:
            await file.refresh(await mount.volume.inner.getattr(file.ino))
        except StaleInode:
            file.orphan()

    length = min(length, source.size_bytes - offset_in)
    return await copy_range(handle(source), offset_in, handle(target), offset_out, length, refresh)


async def seen(mount: Mount, name: bytes) -> bytes:
    """The committed bytes under a name."""
    return await mount.content((await mount.volume.inner.lookup(ROOT_INO, name)).ino)


async def references(world: World) -> set[tuple[int, ...]]:
    """(blob, ino) of every key of table r."""
    prefix = KEYS.table(b"r")
    return {KEYS.parse_numbers(kv.key) for kv in (await world.store.range(Range(prefix, prefix_end(prefix)))).kvs}


async def test_no_byte_moves(world: World, mount: Mount, other: Mount) -> None:
    source = await saved(mount, b"s", (0, LARGE))
    target = await saved(mount, b"t")
    puts = len(world.blobs.puts)
    assert await copied(mount, source, target) == len(LARGE)
    assert (len(world.blobs.puts), world.blobs.reads) == (puts, [])
    (extent,) = source.inode.extents
    assert target.inode.extents == (extent,)
    assert await references(world) == {(extent.blob, source.ino), (extent.blob, target.ino)}
    assert not target.is_dirty
    assert await seen(other, b"t") == LARGE


async def test_a_range_of_several_blobs_with_holes(world: World, mount: Mount, other: Mount) -> None:
    source = await saved(mount, b"s", (100, LARGE[:700]), (1500, LARGE[:900]), (1600, b"x" * 77))
    target = await saved(mount, b"t", (0, b"t" * 3000))
    whole = await mount.content(source.ino)
    assert await copied(mount, source, target, 333, 1001, 1400) == 1400
    wanted = b"t" * 1001 + whole[333:1733] + b"t" * (3000 - 2401)
    assert await seen(other, b"t") == wanted
    assert await seen(mount, b"s") == whole
    blobs = {extent.blob for extent in source.inode.extents}
    assert {pair for pair in await references(world) if pair[1] == source.ino} == {(b, source.ino) for b in blobs}


async def test_neither_changes_the_other_afterwards(mount: Mount, other: Mount) -> None:
    source = await saved(mount, b"s", (0, LARGE))
    target = await saved(mount, b"t")
    await copied(mount, source, target)
    await target.write(10, b"target")
    await target.commit()
    theirs = await other.bodies.open((await other.volume.inner.lookup(ROOT_INO, b"s")).ino)
    await theirs.write(20, b"source")
    await theirs.commit()
    assert await seen(other, b"t") == LARGE[:10] + b"target" + LARGE[16:]
    assert await seen(mount, b"s") == LARGE[:20] + b"source" + LARGE[26:]
    await other.volume.inner.unlink(ROOT_INO, b"s")
    assert await seen(other, b"t") == LARGE[:10] + b"target" + LARGE[16:]


async def test_a_clone_of_a_clone(world: World, mount: Mount) -> None:
    first = await saved(mount, b"1", (0, LARGE))
    second, third = await saved(mount, b"2"), await saved(mount, b"3")
    await copied(mount, first, second)
    await first.truncate(SetAttr(size_bytes=0))
    await copied(mount, second, third)
    (extent,) = third.inode.extents
    assert await references(world) == {(extent.blob, file.ino) for file in (first, second, third)}
    assert await mount.content(third.ino) == LARGE


async def test_what_is_not_committed_yet_goes_along(mount: Mount, other: Mount) -> None:
    source, target = await saved(mount, b"s", (0, LARGE)), await saved(mount, b"t")
    await source.write(100, b"new")
    await target.write(6000, b"tail")
    assert await copied(mount, source, target) == len(LARGE)
    wanted = LARGE[:100] + b"new" + LARGE[103:]
    assert await seen(other, b"t") == wanted + bytes(1000) + b"tail"


async def test_inline_bodies_are_copied(world: World, mount: Mount, other: Mount) -> None:
    source, target = await saved(mount, b"s", (0, b"small")), await saved(mount, b"t")
    assert await copied(mount, source, target) == 5
    await target.commit()
    assert await seen(other, b"t") == b"small"
    assert await references(world) == set()


@pytest.mark.parametrize(("offset_out", "is_shared"), [(0, True), (3, False)])
async def test_inline_bytes_of_the_target(
    world: World, mount: Mount, other: Mount, offset_out: int, is_shared: bool
) -> None:
    """They are replaced with all the rest, or they stay, and go with what is copied into one body."""
    source, target = await saved(mount, b"s", (0, LARGE)), await saved(mount, b"t", (0, b"inline"))
    puts = len(world.blobs.puts)
    assert await copied(mount, source, target, 0, offset_out) == len(LARGE)
    await target.commit()
    assert await seen(other, b"t") == b"inline"[:offset_out] + LARGE
    assert (len(world.blobs.puts) == puts) == is_shared


async def test_a_source_that_was_cut_elsewhere_meanwhile(mount: Mount, other: Mount) -> None:
    source, target = await saved(mount, b"s", (0, LARGE), (5000, LARGE)), await saved(mount, b"t")
    await other.volume.inner.lookup(ROOT_INO, b"s")
    await other.volume.inner.setattr(source.ino, SetAttr(size_bytes=3000))
    assert await copied(mount, source, target) == 3000
    assert await seen(other, b"t") == LARGE[:3000]


async def test_a_source_without_a_name_is_copied(world: World, mount: Mount, other: Mount) -> None:
    source, target = await saved(mount, b"s", (0, LARGE)), await saved(mount, b"t")
    await other.volume.inner.unlink(ROOT_INO, b"s")
    assert await copied(mount, source, target) == len(LARGE)
    await target.commit()
    assert await seen(other, b"t") == LARGE
    assert await references(world) == set()


async def test_a_target_that_others_change_meanwhile(mount: Mount, other: Mount) -> None:
    source, target = await saved(mount, b"s", (0, LARGE)), await saved(mount, b"t")
    theirs = await other.bodies.open((await other.volume.inner.lookup(ROOT_INO, b"t")).ino)
    await theirs.write(0, b"inline")
    await theirs.commit()
    assert await copied(mount, source, target) == len(LARGE)
    assert await seen(other, b"t") == LARGE


async def test_many_blobs_take_several_calls(
    world: World, mount: Mount, other: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "BLOBS_MAX", 3)
    source = await saved(mount, b"s", *((index * 500, LARGE[:500]) for index in range(10)))
    target = await saved(mount, b"t")
    reads = len(world.blobs.reads)
    counts = []
    while target.size_bytes < source.size_bytes:
        counts.append(await copied(mount, source, target, target.size_bytes, target.size_bytes))
    assert counts == [1500, 1500, 1500, 500]
    assert len(world.blobs.reads) == reads
    assert await seen(other, b"t") == LARGE[:500] * 10


async def test_within_one_file_a_blob_stays_private(world: World, mount: Mount, other: Mount) -> None:
    file = await saved(mount, b"f", (0, LARGE))
    assert await copied(mount, file, file, 1000, 7000, 2000) == 2000
    assert await seen(other, b"f") == LARGE + bytes(2000) + LARGE[1000:3000]
    assert await references(world) == set()


@pytest.mark.parametrize("fault", ["lost", "applied"])
async def test_a_share_without_an_answer_can_be_repeated(mount: Mount, other: Mount, fault: str) -> None:
    source, target = await saved(mount, b"s", (0, LARGE)), await saved(mount, b"t")
    mount.volume.faults = [fault]
    with pytest.raises(OutcomeUnknown):
        await copied(mount, source, target)
    await target.write(0, b"since" * 20)
    await target.commit()
    assert await copied(mount, source, target, 100, 100) == len(LARGE) - 100
    assert await seen(other, b"t") == b"since" * 20 + LARGE[100:]


async def test_a_hole_is_shared_without_any_blob(world: World, mount: Mount, other: Mount) -> None:
    source = await saved(mount, b"s", (5000, LARGE))
    target = await saved(mount, b"t", (0, LARGE))
    assert await copied(mount, source, target, 0, 100, 4000) == 4000
    assert await seen(other, b"t") == LARGE[:100] + bytes(4000) + LARGE[4100:]
    assert await references(world) == set()
