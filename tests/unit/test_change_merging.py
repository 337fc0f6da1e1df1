"""Small segments of the archive become one: what readers get stays the same, and the index stays short."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

import pytest
import trio

from apollofs.metadata import codec, journal
from apollofs.metadata.changes import merging
from apollofs.metadata.changes.archive_index import ArchiveIndex, SegmentEntry
from apollofs.metadata.changes.archiver import ArchiveOptions, Archiver
from apollofs.metadata.changes.merging import NEWEST_MAX, Merger, joined
from apollofs.metadata.changes.record import ChangeRecord, SlotEntry
from apollofs.metadata.changes.segment import Segment, pack, unpack
from apollofs.metadata.errors import ArchiveUnavailable
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.records import ROOT_INO, RenameFlag
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, mounted

MINUTE_NS = 60 * 10**9
DAY_MINUTES = 24 * 60


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Where three segments are enough to be merged."""
    monkeypatch.setattr(merging, "MERGED_AT_ONCE", 3)
    async with made_world() as world:
        yield world


async def a_turn(volume: Volume, number: int) -> None:
    """Directories are made, moved with what is below them, and exchanged."""
    outer = (await volume.mkdir(ROOT_INO, b"outer%d" % number, 0o755, ME)).ino
    inner = (await volume.mkdir(outer, b"inner", 0o755, ME)).ino
    await volume.settle()
    await volume.mkdir(inner, b"one", 0o755, ME)
    await volume.rename(ROOT_INO, b"outer%d" % number, ROOT_INO, b"moved%d" % number)
    await volume.mkdir(inner, b"two", 0o755, ME)
    if number:
        await volume.rename(ROOT_INO, b"moved%d" % number, ROOT_INO, b"moved0", RenameFlag.EXCHANGE)
        await volume.mkdir(inner, b"three", 0o755, ME)
    await volume.settle()


async def fill(world: World, volume: Volume, turns: int, options: ArchiveOptions | None = None) -> list[ChangeRecord]:
    """Archive after each of some turns; what the log has, read before anything of it was merged."""
    whole: list[ChangeRecord] = []
    start = await world.log().beginning()
    for number in range(turns):
        await a_turn(volume, number)
        found = await world.read(start)
        whole += found
        start = await world.log().now()
        await world.archive(options)
    return whole


async def small_ones(world: World, volume: Volume, *names: bytes) -> None:
    """A segment for each name."""
    for name in names:
        await volume.mkdir(ROOT_INO, name, 0o755, ME)
        await volume.settle()
        await world.archive()


async def test_what_is_read_stays_the_same(world: World) -> None:
    async with mounted(world.store) as volume:
        whole = await fill(world, volume, 14)
        # its paths come from the segments alone
        await world.store.compact((await ArchiveIndex(world.store, KEYS).state()).through)
        page = await ArchiveIndex(world.store, KEYS).page(0)
        assert len(page.entries) < 14
        assert sorted(entry.name for entry in page.entries) == sorted(await world.objects())
        assert page.state.size_bytes == sum(entry.size_bytes for entry in page.entries)
        assert sum(entry.changes for entry in page.entries) == len(whole)
        for at, record in enumerate(whole):
            assert await world.read(record.position) == whole[at:]
            since = await world.log().since(record.change.time_ns)
            assert since <= record.position


async def test_a_segment_has_no_more_than_it_may(world: World) -> None:
    async with mounted(world.store) as volume:
        await fill(world, volume, 10, ArchiveOptions(changes_max=20))
        changes = [entry.changes for entry in (await ArchiveIndex(world.store, KEYS).page(0)).entries]
        assert 7 < max(changes) <= 20
        whole = await world.read()
        await fill(world, volume, 0, ArchiveOptions(changes_max=20))
        assert await world.read() == whole


async def test_a_reader_that_comes_too_late_for_one_goes_on(world: World) -> None:
    """It has read the index, and what it says is merged before it asks for the segments."""
    async with mounted(world.store) as volume:
        await small_ones(world, volume, b"a", b"b")
        whole = await world.read()
        await volume.mkdir(ROOT_INO, b"c", 0o755, ME)
        await volume.settle()
        log = world.log()
        get, merged = log._segments.get, False

        async def late(entry: SegmentEntry) -> bytes | None:
            nonlocal merged
            if not merged:
                merged = True
                await world.archive()
                assert len(await world.objects()) == 1
            return await get(entry)

        log._segments.get = late  # type: ignore[method-assign]
        found: list[ChangeRecord] = []
        async for batch in log.read(await log.beginning()):
            found += batch.records
        assert found[: len(whole)] == whole
        assert found == await world.read()


async def test_what_can_not_be_merged_now_is_merged_later(world: World) -> None:
    async with mounted(world.store) as volume:
        await small_ones(world, volume, b"a", b"b")
        segments = world.segments()
        get = segments.get

        async def refuse(entry: SegmentEntry) -> bytes | None:
            await trio.lowlevel.checkpoint()
            raise ArchiveUnavailable("by the test")

        segments.get = refuse  # type: ignore[method-assign]
        await volume.mkdir(ROOT_INO, b"c", 0o755, ME)
        await volume.settle()
        archiver = Archiver(world.store, KEYS, segments, ArchiveOptions())
        await archiver.run(once=True)
        assert (archiver.report.segments, len(await world.objects())) == (1, 3)
        segments.get = get  # type: ignore[method-assign]
        await archiver.run(once=True)
        assert len(await world.objects()) == 1


@pytest.mark.expects_log("can't be merged: segment changes/.* is missing")
async def test_a_segment_that_is_missing_does_not_keep_from_archiving(world: World) -> None:
    async with mounted(world.store) as volume:
        await small_ones(world, volume, b"a", b"b")
        await world.blobs.delete((await world.objects())[0])
        await small_ones(world, volume, b"c", b"d")
        assert len(await world.keys_in("a")) == 4


async def test_an_object_that_stays_is_an_orphan(world: World) -> None:
    """What was merged could not be deleted: the next archiver does it."""
    async with mounted(world.store) as volume:
        await small_ones(world, volume, b"a", b"b")
        segments = world.segments()

        async def refuse(entry: SegmentEntry) -> None:
            await trio.lowlevel.checkpoint()
            raise ArchiveUnavailable("by the test")

        segments.delete = refuse  # type: ignore[method-assign]
        await volume.mkdir(ROOT_INO, b"c", 0o755, ME)
        await volume.settle()
        await Archiver(world.store, KEYS, segments, ArchiveOptions()).run(once=True)
        assert (len(await world.objects()), len(await world.keys_in("a"))) == (4, 1)
        assert (await world.archive()).orphans == 3
        assert len(await world.read()) == sum(
            entry.changes for entry in (await ArchiveIndex(world.store, KEYS).page(0)).entries
        )


def entry(revision: int, *changes: Change) -> SlotEntry:
    slot = journal.encode(SlotRecord(revision, 1, 0, changes))
    return SlotEntry(revision, 1, codec.decode_fields(slot))


def test_places_that_only_a_later_segment_knows() -> None:
    """Nobody knew where a directory was when the earlier one was gathered: what it was moved to is not where it was."""
    mode = stat.S_IFDIR | 0o755
    move = Change(Kind.RENAME, 7, ROOT_INO, b"new", mode=mode, old_parent=9, old_name=b"old")
    exchange = Change(Kind.EXCHANGE, 5, ROOT_INO, b"a", mode=mode, old_parent=ROOT_INO, old_name=b"b", ino2=6)
    below = [Change(Kind.MKDIR, 100 + ino, ino, b"in", mode=mode) for ino in (5, 6, 7, 8)]
    before = Segment(10, 19, {4: (ROOT_INO, b"four")}, [entry(11, *below), entry(12, move), entry(13, exchange)])
    behind = Segment(20, 29, {ino: (ROOT_INO, b"%d" % ino) for ino in (4, 5, 6, 7, 8)}, [entry(21, *below)])
    one = joined([before, behind])
    assert (one.first_revision, one.last_revision) == (10, 29)
    assert one.directories == {4: (ROOT_INO, b"four"), 8: (ROOT_INO, b"8")}
    assert unpack(pack(one)) == one
    assert [each.revision for each in one.entries] == [11, 12, 13, 21]


# -- which ones -------------------------------------------------------------------------------------------------------


def segment(minute: int, changes: int) -> SegmentEntry:
    first, now_ns = 100 * minute, minute * MINUTE_NS
    return SegmentEntry(first, first + 99, now_ns, now_ns, changes, 20 * changes, 1, f"{minute}", now_ns, 100 * changes)


def merged(chosen: list[SegmentEntry]) -> SegmentEntry:
    first, last = chosen[0], chosen[-1]
    changes = sum(each.changes for each in chosen)
    begun_ns = first.merged_from_ns or first.archived_ns
    return last._replace(
        first_revision=first.first_revision, changes=changes, gathered_bytes=100 * changes, merged_from_ns=begun_ns
    )


def merger_of(world: World, keep_s: float) -> Merger:
    return Merger(ArchiveIndex(world.store, KEYS), world.segments(), 50_000, 8 << 20, keep_s)


@pytest.mark.parametrize("changes", [1, 30, 700])
async def test_the_index_stays_short(changes: int) -> None:
    """A segment a minute for three days: how many are left, and how often a change is stored."""
    minutes = 3 * DAY_MINUTES
    entries: list[SegmentEntry] = []
    stored = 0
    async with made_world() as world:
        merger = merger_of(world, 0)
    for minute in range(1, minutes + 1):
        entries.append(segment(minute, changes + minute % 3))
        merger.note(entries[-1:])
        while chosen := merger._chosen():
            one = merged(chosen)
            assert one.changes <= 50_000
            assert one.archived_ns - one.merged_from_ns <= DAY_MINUTES * MINUTE_NS
            stored += one.changes
            merger._take(chosen, one)
            entries = [*(each for each in entries if each not in chosen), one]
            entries.sort()
    total = sum(each.changes for each in entries)
    assert total == sum(changes + minute % 3 for minute in range(1, minutes + 1))
    assert stored <= 6 * total
    assert len(entries) <= NEWEST_MAX + 3 + 2 * total // 50_000


async def test_what_is_kept_for_an_hour_is_not_merged_with_what_goes_later() -> None:
    async with made_world() as world:
        merger = merger_of(world, 3600)
        merger.note(segment(minute, 1) for minute in range(1, 40))
        assert [each.name for each in merger._chosen()] == [str(minute) for minute in range(1, 9)]
