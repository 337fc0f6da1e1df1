"""The archive of the change log: who may write it, what it keeps, and what etcd may forget behind it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import cast

import pytest
import trio
import trio.testing

from apollofs.fs.blobs import block_named
from apollofs.metadata import codec
from apollofs.metadata.changes import archiver as archiver_module
from apollofs.metadata.changes.archive_index import POINTS_MAX, ArchiveIndex, ArchiveState, SegmentEntry
from apollofs.metadata.changes.archiver import SEGMENT_PREFIX, ArchiveOptions, Archiver
from apollofs.metadata.changes.compaction import CompactionOptions, compact_behind_archive
from apollofs.metadata.changes.position import Position, parse_position
from apollofs.metadata.changes.role import held_role
from apollofs.metadata.changes.segment import pack, unpack
from apollofs.metadata.errors import (
    ArchiveUnavailable,
    ChangesLost,
    Compacted,
    CorruptRecord,
    RoleLost,
    RoleTaken,
    SiteInUse,
)
from apollofs.metadata.format import add_site, remove_site
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Delete, Op, Put, Range
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, SITE, VOLUME, mounted

SMALL = ArchiveOptions(changes_max=5)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


async def make(volume: Volume, count: int, prefix: bytes = b"d") -> None:
    for number in range(count):
        await volume.mkdir(ROOT_INO, b"%s%d" % (prefix, number), 0o755, ME)
        await volume.settle()


async def test_segments_are_read_from_the_middle_and_by_time(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 12)
        whole = await world.read()
        report = await world.archive(SMALL)
        assert report.segments == 3
        assert len(await world.objects()) == 3
        assert await world.read() == whole
        log = world.log()
        for at, record in enumerate(whole):
            start = await log.since(record.change.time_ns)
            assert start <= record.position
            assert at < 5 or start > whole[at - 5].position
        assert await log.since(time.time_ns() + 10**9) > whole[-1].position


async def test_archiving_goes_on_where_it_ended(world: World) -> None:
    async with mounted(world.store) as volume:
        for number in range(3):
            await make(volume, 3, b"%d-" % number)
            await world.archive(SMALL)
            assert (await world.archive(SMALL)).segments == 0
        await world.store.compact((await ArchiveIndex(world.store, KEYS).state()).through)
        assert len(await world.read()) == 10


async def test_a_change_may_not_wait_at_all(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 3)
        with trio.fail_after(30):
            assert (await world.archive(ArchiveOptions(flush_s=0))).changes == 4


async def test_one_archiver_at_a_time(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 3)
        async with held_role(world.store, KEYS.archiver, "archives the change log", 10, wait=False):
            with pytest.raises(RoleTaken, match="archives the change log already"):
                await world.archive(wait=False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.archive, SMALL)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert (await world.archive(SMALL)).segments == 1


async def test_one_that_was_replaced_adds_nothing(world: World) -> None:
    """It was frozen while it stored a segment: the object comes late, and is removed by the next archiver."""
    async with mounted(world.store) as volume:
        await make(volume, 3)
        segments = world.segments()
        put = segments.put

        async def slow_put(name: str, data: bytes) -> None:
            (key,) = (await world.store.range(Range(KEYS.archiver))).kvs
            await world.store.lease_revoke(key.lease)
            await world.archive(SMALL)
            await put(name, data)

        segments.put = slow_put  # type: ignore[method-assign]
        with pytest.raises(RoleLost):
            await Archiver(world.store, KEYS, segments, SMALL).run(once=True)
        assert len(await world.keys_in("a")) == 1
        assert len(await world.objects()) == 2
        assert (await world.archive(SMALL)).orphans == 1
        assert len(await world.objects()) == 1
        assert len(await world.read()) == 4


async def test_retention_by_size_and_by_age(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 20)
        whole = await world.read()
        assert (await world.archive(SMALL)).segments == 5
        page = await ArchiveIndex(world.store, KEYS).page(0)
        two = sum(entry.size_bytes for entry in page.entries[-2:])
        assert (await world.archive(ArchiveOptions(keep_bytes=two))).removed_segments == 3
        assert [entry.name for entry in page.entries[-2:]] == await world.objects()
        with pytest.raises(ChangesLost) as caught:
            await world.read()
        assert await world.read(parse_position(caught.value.first)) == whole[15:]
        assert (await world.archive(ArchiveOptions(keep_s=3600))).removed_segments == 0
        assert (await world.archive(ArchiveOptions(keep_s=1e-6))).removed_segments == 2
        assert await world.objects() == []
        await make(volume, 1, b"new")
        with pytest.raises(ChangesLost) as caught:
            await world.read(whole[-1].position)
        assert len(await world.read(parse_position(caught.value.first))) == 1


async def test_by_time_what_retention_has_removed_is_not_passed_over(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 12)
        whole = await world.read()
        await world.archive(SMALL)
        first = whole[0].change.time_ns
        assert await world.read(await world.log().since(first)) == whole
        newest = (await ArchiveIndex(world.store, KEYS).page(0)).entries[-1]
        assert (await world.archive(ArchiveOptions(keep_bytes=newest.size_bytes))).removed_segments == 2
        for record in whole[:10]:
            with pytest.raises(ChangesLost):
                await world.read(await world.log().since(record.change.time_ns))
        assert await world.read(await world.log().since(whole[10].change.time_ns)) == whole[10:]
        assert (await world.archive(ArchiveOptions(keep_bytes=1))).removed_segments == 1
        with pytest.raises(ChangesLost):
            await world.read(await world.log().since(whole[-1].change.time_ns))
        # of a time of which nothing is lost nothing is missing
        assert await world.read(await world.log().since(whole[-1].change.time_ns + 1)) == []


@pytest.mark.expects_log("were compacted before they were archived")
async def test_by_time_what_was_compacted_is_not_passed_over(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 3)
        await world.archive()
        before = time.time_ns()
        await make(volume, 3, b"lost")
        await world.store.compact((await world.log().now()).revision - 1)
        await make(volume, 1, b"after")
        await world.archive()
        with pytest.raises(ChangesLost):
            await world.read(await world.log().since(before))


@pytest.mark.parametrize("days", [-3650, 3650])
async def test_a_mount_with_a_wrong_clock_does_not_decide_what_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    real, week_s = time.time_ns, 7 * 86400
    async with mounted(world.store) as volume:
        monkeypatch.setattr("time.time_ns", lambda: real() + days * 86400 * 10**9)
        await make(volume, 1)
        monkeypatch.setattr("time.time_ns", real)
        await world.archive()
        assert (await world.archive(ArchiveOptions(keep_s=week_s))).removed_segments == 0
        monkeypatch.setattr("time.time_ns", lambda: real() + 2 * week_s * 10**9)
        assert (await world.archive(ArchiveOptions(keep_s=week_s))).removed_segments == 1


async def test_the_index_is_not_read_to_know_its_size(world: World) -> None:
    pages = 0

    async def count(moment: Moment, request: Request) -> None:
        nonlocal pages
        await trio.lowlevel.checkpoint()
        asked = request.arguments[1] if request.method == "txn" else ()
        pages += moment is Moment.BEFORE and any(
            isinstance(op, Range) and op.range_end for op in cast("list[Op]", asked)
        )

    async with mounted(world.store) as volume:
        index = ArchiveIndex(world.store, KEYS)
        for number in range(4):
            await make(volume, 12, b"%d-" % number)
            await world.archive(SMALL)
            found = await index.page(0)
            assert found.state.size_bytes == sum(entry.size_bytes for entry in found.entries)
        role_of = held_role(world.store, KEYS.archiver, "archives the change log", 15, wait=False)
        archiver = Archiver(world.store.another(count), KEYS, world.segments(), ArchiveOptions(keep_bytes=1 << 40))
        async with role_of as role:
            archiver._state = found.state
            await archiver._retire(role)
        assert pages == 1
        keep = ArchiveOptions(keep_bytes=found.entries[-1].size_bytes)
        await world.archive(keep)
        assert (await index.state()).size_bytes == keep.keep_bytes


async def test_an_index_that_does_not_tell_of_what_is_lost(world: World) -> None:
    """As archivers of before have written it."""
    async with mounted(world.store) as volume:
        await make(volume, 2)
        await world.archive()
        page = await ArchiveIndex(world.store, KEYS).page(0)
        points = [number for point in page.state.points for number in point]
        old = codec.encode_fields([page.state.through, page.state.open_from, points])
        await world.store.txn((), [Put(KEYS.archive_state, old), Delete(KEYS.segment(page.entries[0].last_revision))])
        with pytest.raises(ChangesLost):
            await world.read(await world.log().since(page.entries[0].last_time_ns))
        await make(volume, 1, b"new")
        for number, known in enumerate([False, True]):
            await make(volume, 1, b"new%d" % number)
            assert (await world.archive(SMALL if not known else ArchiveOptions(keep_bytes=1))).segments == 1
            page = await ArchiveIndex(world.store, KEYS).page(0)
            assert (page.state.size_bytes, len(page.entries)) == ((0, 0) if known else (None, 1))


@pytest.mark.expects_log("old segments stay in the store of site 1")
async def test_retention_does_not_wait_for_a_store_that_is_lost(world: World) -> None:
    segments, asked = world.segments(), 0

    async def refuse(entry: SegmentEntry) -> None:
        nonlocal asked
        asked += 1
        await trio.lowlevel.checkpoint()
        raise ArchiveUnavailable("by the test")

    segments.delete = refuse  # type: ignore[method-assign]
    async with mounted(world.store) as volume:
        await make(volume, 12)
        assert (await world.archive(SMALL)).segments == 3
        await make(volume, 1, b"new")
        newest = (await world.log().now()).revision
        archiver = Archiver(world.store, KEYS, segments, ArchiveOptions(keep_s=1e-6, flush_s=0.01))
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: archiver.run(once=False))
                while archiver.report.through < newest or archiver.report.removed_segments < 4:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert asked < 4, "one failure is enough for a while"
        assert (len(await world.objects()), await world.keys_in("a")) == (4, [])
        assert (await world.archive(SMALL)).orphans == 4
        assert await world.objects() == []


async def test_a_site_with_segments_stays(world: World) -> None:
    await add_site(world.store, VOLUME, "other", (("kind", "memory"),))
    await world.archive()
    with pytest.raises(SiteInUse, match="change log"):
        await remove_site(world.store, VOLUME, SITE)
    await remove_site(world.store, VOLUME, "other")


@pytest.mark.expects_log("were compacted before they were archived")
async def test_a_gap_is_told_and_stays_told(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 3)
        await world.archive()
        await make(volume, 3, b"lost")
        await world.store.compact((await world.log().now()).revision - 1)
        await make(volume, 3, b"after")
        report = await world.archive()
        assert report.lost_revisions >= 3
        with pytest.raises(ChangesLost) as caught:
            await world.read()
        assert len(await world.read(parse_position(caught.value.first))) == 3
        await world.store.compact(report.through)
        with pytest.raises(ChangesLost) as again:
            await world.read()
        assert again.value.first == caught.value.first


async def test_a_damaged_or_missing_segment_is_an_error(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 3)
        await world.archive()
        (name,) = await world.objects()
        data = await world.blobs.read(name)
        for at in (0, len(data) // 2, len(data) - 1):
            damaged = bytearray(data)
            damaged[at] ^= 1
            with pytest.raises(CorruptRecord):
                unpack(bytes(damaged))
        segment = unpack(data)
        assert pack(segment) == data
        await world.blobs.put(name, data + b"more")
        with pytest.raises(ArchiveUnavailable):
            await world.read()
        await world.blobs.delete(name)
        with pytest.raises(ArchiveUnavailable, match="missing"):
            await world.read()


@pytest.mark.expects_log("waits for its store")
async def test_a_store_that_is_down_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver_module, "BACKOFF_FIRST_S", 0.001)
    segments = world.segments()
    put, failures = segments.put, 3

    async def failing_put(name: str, data: bytes) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ArchiveUnavailable("by the test")
        await put(name, data)

    segments.put = failing_put  # type: ignore[method-assign]
    async with mounted(world.store) as volume:
        await make(volume, 3)
        with pytest.raises(ArchiveUnavailable):
            await Archiver(world.store, KEYS, segments, SMALL).run(once=True)
        archiver = Archiver(world.store, KEYS, segments, ArchiveOptions(flush_s=0.01))
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: archiver.run(once=False))
                while not archiver.report.segments:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert len(await world.read()) == 4


# -- compaction -------------------------------------------------------------------------------------------------------

AT_ONCE = CompactionOptions(keep_s=0)


async def compacted_to(world: World) -> int:
    return world.store.shared.data.compacted


async def test_only_what_is_archived_is_forgotten(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 5)
        found = await compact_behind_archive(world.store, AT_ONCE)
        assert (found.revision, await compacted_to(world)) == (0, 0)
        through = (await world.archive()).through
        await make(volume, 5, b"new")
        found = await compact_behind_archive(world.store, AT_ONCE)
        assert found.revision == await compacted_to(world) == through
        assert len(await world.read()) == 11


async def test_what_was_archived_just_now_stays(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 5)
        await world.archive()
        found = await compact_behind_archive(world.store, CompactionOptions(keep_s=600))
        assert found.revision == 0
        assert "volume 'test'" in found.held_back_by


async def test_others_in_the_same_etcd_hold_it_back(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, 5)
        through = (await world.archive()).through
        await world.store.txn((), [Put(b"apollofs/other/S", b"")])
        found = await compact_behind_archive(world.store, AT_ONCE)
        assert "'other'" in found.held_back_by
        for key in (b"apollo", b"zookeeper"):
            await world.store.txn((), [Put(key, b"")])
            found = await compact_behind_archive(world.store, CompactionOptions(0, frozenset({"other"})))
            assert "other applications" in found.held_back_by
        assert await compacted_to(world) == 0
        found = await compact_behind_archive(world.store, CompactionOptions(0, frozenset({"other"}), shared=True))
        assert found.revision == await compacted_to(world) == through
        again = await compact_behind_archive(world.store, CompactionOptions(0, frozenset({"other"}), shared=True))
        assert again.revision in (0, through)


async def test_without_any_change_the_archive_still_follows(world: World) -> None:
    """Another volume's changes let the revision grow; what has no history of this one may be forgotten too."""
    await world.archive()
    for _ in range(5):
        await world.store.txn((), [Put(b"apollofs/other/S", b"")])
    through = (await world.archive()).through
    assert len(await world.keys_in("a")) == 1
    await world.store.compact(through)
    assert len(await world.read()) == 1
    with pytest.raises(Compacted):
        await world.store.range(Range(KEYS.superblock, revision=through - 1))


def test_points_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    state, now = ArchiveState(), 0
    monkeypatch.setattr("apollofs.metadata.changes.archive_index.time.time_ns", lambda: now)
    for revision in range(1, 2000):
        now = revision * 60 * 10**9
        state = state.advanced(revision, revision + 1)
    assert len(state.points) <= POINTS_MAX
    assert state.points == tuple(sorted(state.points))
    assert state.points[-1][0] > 1990


def test_names_of_segments_are_beside_those_of_blocks() -> None:
    assert block_named(f"{SEGMENT_PREFIX}{1:016x}-{2:016x}", 5) is None
    assert Position(1) < Position(1, 1) < Position(2)
