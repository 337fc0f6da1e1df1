"""What the collector removes, and what it leaves: open files, the grace time, other referents, living sessions."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio
import trio.lowlevel

from apollofs.blobstore import BlobStoreOptions, BlobStoreUnavailable
from apollofs.fs import collecting
from apollofs.fs.blobs import Block, block_named
from apollofs.fs.collection import CollectOptions
from apollofs.fs.collector import FAILED, IN_USE, SILENT
from apollofs.metadata.collector import open_collector
from apollofs.metadata.errors import CollectorBusy
from apollofs.metadata.records import ROOT_INO, Body, RenameFlag, SetAttr
from apollofs.metadata.session_opening import open_session
from tests.support.collecting import KEYS, collect, keys_in, objects
from tests.support.filesystems import LARGE, OWNER, USER, Pair, close, content, create, save
from tests.support.volumes import OPTIONS, mount_record, mounted


async def unlink(pair: Pair, name: bytes = b"f") -> None:
    await pair.here.unlink(ROOT_INO, name)
    await pair.volume.settle()


async def test_an_unlinked_file_goes_with_all_that_it_had(pair: Pair) -> None:
    await save(pair.here, b"kept", LARGE)
    ino = await save(pair.here, b"f", LARGE)
    await pair.here.setxattr(ino, b"user.a", b"value", 0)
    await save(pair.here, b"small", b"inline")
    await unlink(pair)
    await unlink(pair, b"small")
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs, report.dropped.bytes) == (2, 1, len(LARGE))
    assert len(await objects(pair.blobs)) == 1
    assert await keys_in(pair.store, "gvxerQAC") == []
    assert await content(pair.there, b"kept") == LARGE
    again = await collect(pair.store, pair.blobs)
    assert (again.tombstones, again.uploads.blobs, again.errors) == (0, 0, [])


async def test_the_pages_of_a_fragmented_file_go_with_it(pair: Pair) -> None:
    _, fh = await create(pair.here)
    for number in range(40):
        await pair.here.write(fh, number * 1000, b"x" * 100)
        await pair.here.fsync(fh, data_only=False)
    await close(pair.here, fh)
    assert await keys_in(pair.store, "e")
    await unlink(pair)
    report = await collect(pair.store, pair.blobs)
    assert report.dropped.blobs >= 33
    assert await objects(pair.blobs) == []
    assert await keys_in(pair.store, "ge") == []


async def test_within_the_grace_everything_stays(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await unlink(pair)
    report = await collect(pair.store, pair.blobs, CollectOptions())
    assert (report.tombstones, report.young) == (0, 1)
    assert len(await objects(pair.blobs)) == 1


async def test_a_dry_run_says_what_would_go_and_leaves_it(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await unlink(pair)
    report = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, dry_run=True))
    assert (report.tombstones, report.dropped.blobs) == (1, 1)
    assert len(await objects(pair.blobs)) == 1
    assert len(await keys_in(pair.store, "g")) == 1
    assert (await collect(pair.store, pair.blobs)).tombstones == 1


async def test_what_another_mount_has_open_stays_readable_until_it_is_closed(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"f")).ino, os.O_RDONLY, USER)
    await unlink(pair)
    report = await collect(pair.store, pair.blobs)
    assert report.kept_by_reason == {IN_USE: 1}
    assert "/mnt" in report.kept[0].why
    assert await pair.there.read(opened.fh, 0, len(LARGE)) == LARGE
    await close(pair.there, opened.fh)
    assert (await collect(pair.store, pair.blobs)).tombstones == 1
    assert await objects(pair.blobs) == []


async def test_what_is_just_being_opened_stays(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body was read before it was unlinked, and arrives after the collector has asked."""
    ino = await save(pair.here, b"f", LARGE)
    await pair.there.lookup(ROOT_INO, b"f")
    read_body, read, go_on = pair.there._volume.read_body, trio.Event(), trio.Event()

    async def late(ino: int) -> Body:
        body = await read_body(ino)
        read.set()
        await go_on.wait()
        return body

    monkeypatch.setattr(pair.there._volume, "read_body", late)
    async with trio.open_nursery() as nursery:

        async def opening() -> None:
            opened = await pair.there.open(ino, os.O_RDONLY, USER)
            assert await pair.there.read(opened.fh, 0, len(LARGE)) == LARGE
            await close(pair.there, opened.fh)

        nursery.start_soon(opening)
        await read.wait()
        await unlink(pair)
        assert (await collect(pair.store, pair.blobs)).kept_by_reason == {IN_USE: 1}
        go_on.set()
    assert (await collect(pair.store, pair.blobs)).tombstones == 1


async def test_a_replaced_file_stays_for_who_has_it_open(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"f")).ino, os.O_RDONLY, USER)
    await save(pair.here, b"new", LARGE[::-1])
    await pair.here.rename(ROOT_INO, b"new", ROOT_INO, b"f", RenameFlag(0))
    assert (await collect(pair.store, pair.blobs)).kept_by_reason == {IN_USE: 1}
    assert await pair.there.read(opened.fh, 0, len(LARGE)) == LARGE
    await close(pair.there, opened.fh)
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1
    assert await content(pair.there) == LARGE[::-1]


async def test_an_old_body_stays_until_who_has_the_file_open_knows_the_new_one(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"f")).ino, os.O_RDONLY, USER)
    await pair.here.setattr(ino, SetAttr(size_bytes=0))
    assert (await collect(pair.store, pair.blobs)).kept_by_reason == {IN_USE: 1}
    await pair.there.getattr(ino)
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1
    assert await pair.there.read(opened.fh, 0, 10) == b""
    await close(pair.there, opened.fh)


async def test_a_mount_that_does_not_answer_keeps_everything(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await unlink(pair)
    mute = await open_session(pair.store, KEYS, OPTIONS, mount_record("/mute"), 1)
    report = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, answer_wait_s=0.1))
    assert report.kept_by_reason == {SILENT: 1}
    assert len(report.silent_mounts) == 1
    assert "/mute" in report.silent_mounts[0]
    assert len(await objects(pair.blobs)) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mute.close)  # while it is asked
        assert (await collect(pair.store, pair.blobs)).tombstones == 1


async def test_a_mount_without_delegations_answers_too(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await unlink(pair)
    async with mounted(pair.store, replace(OPTIONS, delegations=False)):
        report = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, answer_wait_s=5))
    assert (report.silent_mounts, report.tombstones) == ([], 1)


async def test_there_is_one_collector(pair: Pair) -> None:
    async with open_collector(pair.store, "test", mount_record(""), OPTIONS, 1.0):
        with pytest.raises(BaseExceptionGroup) as caught:
            await collect(pair.store, pair.blobs)
    assert caught.group_contains(CollectorBusy)
    async with open_collector(pair.store, "test", mount_record(""), OPTIONS, 1.0):
        with pytest.raises(CollectorBusy):  # as an agent expects it
            await collecting.collect(pair.store, "test", CollectOptions(), BlobStoreOptions(), "0")
    assert (await collect(pair.store, pair.blobs)).errors == []


async def test_a_store_that_refuses_keeps_the_tombstone(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await unlink(pair)
    pair.blobs.fail_deletes = [BlobStoreUnavailable("by the test")]
    report = await collect(pair.store, pair.blobs)
    assert report.kept_by_reason == {FAILED: 1}
    assert len(report.errors) == 1
    assert (await collect(pair.store, pair.blobs)).tombstones == 1
    assert await objects(pair.blobs) == []


async def test_uploads_of_ended_sessions_go_and_those_of_living_ones_stay(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    committed = await objects(pair.blobs)
    async with mounted(pair.store) as ended:
        dead = [Block(ended.new_blob(), index, 10) for index in (0, 3)]
    living = Block(pair.volume.new_blob(), 0, 10)
    unknown = Block(1 << 56 | 999 << 32 | 1, 0, 10)
    for block in (*dead, living, unknown):
        await pair.blobs.put(block.name, b"0123456789")
    await pair.blobs.put("somebody/elses", b"x")
    assert (await collect(pair.store, pair.blobs, CollectOptions())).young_uploads == 2
    dry = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, dry_run=True))
    assert dry.uploads.blobs == 2
    none = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, uploads=False))
    assert none.uploads.blobs == 0
    # so little memory that each blob is looked for on its own
    report = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, candidates_max=1))
    assert (report.uploads.blobs, report.uploads.bytes) == (2, 20)
    assert sorted(await objects(pair.blobs)) == sorted([*committed, living.name, unknown.name, "somebody/elses"])
    assert await content(pair.there) == LARGE


@pytest.mark.expects_log("session .* has lost its lease")
async def test_what_ended_sessions_have_committed_stays(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    _, fh = await create(pair.here, b"many")
    for number in range(40):
        await pair.here.write(fh, number * 1000, b"x" * 100)
        await pair.here.fsync(fh, data_only=False)
    await close(pair.here, fh)
    await save(pair.here, b"gone", LARGE)
    await pair.here.link((await pair.here.lookup(ROOT_INO, b"f")).ino, ROOT_INO, b"g")
    before = await objects(pair.blobs)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"gone")).ino, os.O_RDONLY, USER)
    await unlink(pair, b"gone")
    pair.volume.session.give_up()
    while not pair.volume.proven:
        await trio.lowlevel.checkpoint()
    report = await collect(pair.store, pair.blobs)
    assert report.uploads.blobs == 0
    assert await objects(pair.blobs) == before
    await pair.there.flush(opened.fh, OWNER, os.getpid())
    await pair.there.release(opened.fh, OWNER, flock=False)


async def test_more_tombstones_than_a_batch(pair: Pair) -> None:
    for number in range(7):
        await save(pair.here, b"%d" % number, LARGE)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"3")).ino, os.O_RDONLY, USER)
    for number in range(7):
        await unlink(pair, b"%d" % number)
    report = await collect(pair.store, pair.blobs, CollectOptions(grace_s=0, batch_max=2, ops_per_s=1e6))
    assert (report.tombstones, report.kept_by_reason) == (6, {IN_USE: 1})
    await close(pair.there, opened.fh)


def test_objects_are_told_from_others() -> None:
    block = Block(5, 7, 9)
    assert block_named(block.name, 9) == block
    assert block_named("00/0000000000000005/00000007", 9) is None
    assert block_named(block.name + "0", 9) is None
    assert block_named("x", 9) is None
