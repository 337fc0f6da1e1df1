"""Packs that are mostly dead are rewritten: the files keep their bytes and times, and the old objects go."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.collection import CollectOptions, Rewritten
from apollofs.metadata.collector_packs import Pack
from apollofs.metadata.copies import Copies, encode_copies
from apollofs.metadata.ops.move_body import Copied, relocate
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, InodeFlag, SetAttr
from apollofs.metadata.store import Put
from tests.support.collecting import AT_ONCE, KEYS, clone, collect, keys_in, objects
from tests.support.filesystems import USER, Pair, close, content
from tests.support.filesystems import pair as pair
from tests.support.packs import MEMBER, body, pack

NOTHING = Rewritten()


async def unlink(pair: Pair, *numbers: int) -> None:
    for number in numbers:
        await pair.here.unlink(ROOT_INO, b"%d" % number)
    await pair.volume.settle()


async def test_what_is_left_is_copied_and_the_old_pack_goes(pair: Pair) -> None:
    inos = await pack(pair, 10)
    before = await pair.there.lookup(ROOT_INO, b"7")
    assert before.ino == inos[7]
    await unlink(pair, *range(7))
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.rewritten) == (7, Rewritten(1, 3 * MEMBER, 3))
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.bytes, report.rewritten) == (3, 10 * MEMBER, NOTHING)
    assert len(await objects(pair.blobs)) == 1
    for number in (7, 8, 9):
        assert await content(pair.there, b"%d" % number) == body(number)
    after = await pair.there.lookup(ROOT_INO, b"7")
    assert after.mtime_ns == before.mtime_ns
    assert await keys_in(pair.store, "gQAC") == []
    assert len(await keys_in(pair.store, "r")) == 3


async def test_several_packs_become_one(pair: Pair) -> None:
    for first in (0, 10, 20):
        await pack(pair, 10, first)
    await unlink(pair, *(number for number in range(30) if number % 10))
    assert (await collect(pair.store, pair.blobs)).rewritten == Rewritten(3, 3 * MEMBER, 3)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 1
    assert [await content(pair.here, b"%d" % number) for number in (0, 10, 20)] == [body(0), body(10), body(20)]


async def test_the_bounds(pair: Pair) -> None:
    """A third is enough; what is young, or in the trash, is not dead; a dry run and 0 change nothing."""
    await pack(pair, 9)
    await unlink(pair, *range(6))
    assert (await collect(pair.store, pair.blobs)).rewritten == NOTHING
    await unlink(pair, 6)
    assert (await collect(pair.store, pair.blobs, CollectOptions())).rewritten == NOTHING
    assert (await collect(pair.store, pair.blobs, replace(AT_ONCE, pack_used_min=0.0))).tombstones == 1
    dry = replace(AT_ONCE, dry_run=True)
    for _ in range(2):
        assert (await collect(pair.store, pair.blobs, dry)).rewritten == Rewritten(1, 2 * MEMBER, 0)
    assert len(await objects(pair.blobs)) == 1
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 2


async def test_a_file_in_the_trash_counts(pair: Pair) -> None:
    await pack(pair, 9)
    await unlink(pair, 8)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"0")).ino, os.O_RDONLY, USER)
    await unlink(pair, *range(6))
    report = await collect(pair.store, pair.blobs)
    assert (report.kept_by_reason, report.rewritten) == ({"in use": 1}, NOTHING)
    await close(pair.there, opened.fh)
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 2


async def test_who_has_it_open_keeps_the_old_bytes(pair: Pair) -> None:
    inos = await pack(pair, 10)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"9")).ino, os.O_RDONLY, USER)
    await unlink(pair, *range(9))
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 1
    report = await collect(pair.store, pair.blobs)
    assert await pair.there.read(opened.fh, 0, 2 * MEMBER) == body(9)
    assert report.kept_by_reason in ({"in use": 1}, {})
    await close(pair.there, opened.fh)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 1
    assert await content(pair.here, b"9") == body(9)
    assert inos[9] == (await pair.here.lookup(ROOT_INO, b"9")).ino


async def test_clones_move_together(pair: Pair) -> None:
    inos = await pack(pair, 10)
    attributes, opened = await pair.here.create(ROOT_INO, b"clone", 0o644, os.O_RDWR | os.O_CREAT, USER)
    await close(pair.here, opened.fh)
    await pair.volume.settle()
    await clone(pair.store, pair.volume, inos[9], attributes.ino)
    await unlink(pair, *range(9))
    assert (await collect(pair.store, pair.blobs)).rewritten == Rewritten(1, MEMBER, 2)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 1
    assert await content(pair.there, b"9") == await content(pair.there, b"clone") == body(9)


async def test_what_is_cloned_many_times_counts_once(pair: Pair) -> None:
    inos = await pack(pair, 10)
    names = [b"clone-%d" % each for each in range(8)]
    for name in names:
        attributes, opened = await pair.here.create(ROOT_INO, name, 0o644, os.O_RDWR | os.O_CREAT, USER)
        await close(pair.here, opened.fh)
        await pair.volume.settle()
        await clone(pair.store, pair.volume, inos[9], attributes.ino)
    await unlink(pair, *range(9))
    assert (await collect(pair.store, pair.blobs)).rewritten == Rewritten(1, MEMBER, 9)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 1
    assert [await content(pair.there, name) for name in names] == [body(9)] * len(names)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30))
def test_each_byte_of_a_pack_counts_once(used: list[tuple[int, int]]) -> None:
    pack = Pack(length=32)
    for start, length in used:
        pack.use(start, start + length)
    assert pack.used_bytes == len({at for start, length in used for at in range(start, min(start + length, 32))})


async def test_a_time_of_zero_stays(pair: Pair) -> None:
    """As files of reproducible archives have."""
    inos = await pack(pair, 10)
    await pair.here.setattr(inos[9], SetAttr(mtime_ns=0))
    await unlink(pair, *range(9))
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 1
    assert (await pair.there.lookup(ROOT_INO, b"9")).mtime_ns == 0


async def test_the_pack_of_an_immutable_file_stays(pair: Pair) -> None:
    inos = await pack(pair, 10)
    await pair.volume.setattr(inos[9], SetAttr(flags=InodeFlag.IMMUTABLE))
    await unlink(pair, *range(8))
    assert (await collect(pair.store, pair.blobs)).rewritten == NOTHING
    await pair.volume.setattr(inos[9], SetAttr(flags=InodeFlag(0)))
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 2


async def test_a_change_while_it_is_copied_wins(pair: Pair) -> None:
    """Half of what was copied is overwritten before the file is moved, and another file is unlinked."""
    inos = await pack(pair, 12)
    await unlink(pair, *range(9))
    put = pair.blobs.put

    async def changing(name: str, data: bytes) -> None:
        await put(name, data)
        pair.blobs.put = put  # type: ignore[method-assign]
        await unlink(pair, 11)
        await pair.here.setattr(inos[10], SetAttr(size_bytes=MEMBER // 2))
        await pair.volume.commit_body(inos[9], BodyChange(0, 2 * MEMBER, holes=((0, 10),), mtime_ns=5))

    pair.blobs.put = changing  # type: ignore[method-assign, assignment]
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 2
    assert await content(pair.there, b"10") == body(10)[: MEMBER // 2]
    assert await content(pair.there, b"9") == bytes(10) + body(9)[10:] + bytes(MEMBER)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 1


async def test_copies_at_other_sites_come_along(pair: Pair) -> None:
    inos = await pack(pair, 10)
    (extent,) = (await pair.volume.read_body(inos[9])).inode.extents
    await pair.store.txn((), [Put(KEYS.copies(extent.blob), encode_copies(Copies((9,))))])
    await unlink(pair, *range(9))
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 1
    (extent,) = (await pair.volume.read_body(inos[9])).inode.extents
    assert KEYS.copies(extent.blob) in await keys_in(pair.store, "b")


@pytest.mark.parametrize("call", ["stat", "read", "put"])
async def test_a_store_that_refuses_is_reported(pair: Pair, call: str) -> None:
    await pack(pair, 10)
    await unlink(pair, *range(9))

    async def refuse(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise BlobStoreUnavailable("by the test")

    names = {"stat": ["stat"], "read": ["read_block"], "put": ["put"]}[call]
    former = {name: getattr(pair.blobs, name) for name in names}
    for name in names:
        setattr(pair.blobs, name, refuse)
    report = await collect(pair.store, pair.blobs)
    assert (len(report.errors), report.rewritten) == (1, NOTHING)
    for name, method in former.items():
        setattr(pair.blobs, name, method)
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 1


def test_relocate() -> None:
    copied = Copied(9, 50, {1: ((10, 30, 0), (40, 50, 20)), 2: ((0, 20, 30),)})
    before = (
        Extent(0, 10, 1, 10, 100),
        Extent(10, 10, 1, 20, 100),
        Extent(20, 5, 3, 0, 5),
        Extent(25, 5, 2, 5, 20),
        Extent(40, 10, 1, 40, 100),
    )
    assert relocate(before, copied) == (
        Extent(0, 20, 9, 0, 50),
        Extent(20, 5, 3, 0, 5),
        Extent(25, 5, 9, 35, 50),
        Extent(40, 10, 9, 20, 50),
    )
    assert relocate((Extent(0, 10, 1, 25, 100),), copied) is None
    assert relocate((Extent(0, 10, 5, 0, 100),), copied) == (Extent(0, 10, 5, 0, 100),)
