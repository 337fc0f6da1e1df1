"""The archiver stopped at each of its requests, and run again: nothing is lost, nothing twice, nothing left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from apollofs.metadata.changes import merging
from apollofs.metadata.changes.archiver import ArchiveOptions, Archiver
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.memory import Moment
from apollofs.metadata.records import ROOT_INO
from tests.faults.hooked_store import HookedStore, Stopped, stopping
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, mounted

pytestmark = pytest.mark.faults
OPTIONS = ArchiveOptions(changes_max=4, keep_bytes=1)
"""Segments are few changes, and go at once: so every kind of step is taken."""
KEPT = ArchiveOptions(changes_max=4)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world, mounted(world.store) as volume:
        for number in range(10):
            await volume.mkdir(ROOT_INO, b"d%d" % number, 0o755, ME)
            await volume.settle()
        yield world


async def stop_at(world: World, step: int, moment: Moment, options: ArchiveOptions) -> None:
    stopped = HookedStore(world.store, stopping(step, moment, ("txn", "range", "lease_grant")))
    try:
        await world.archive(options, store=stopped)
    except* Stopped:
        pass
    # a process that ends leaves its lease behind; here it was given back
    assert await world.keys_in("L") == []


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(16))
async def test_stopped_at_a_request(world: World, step: int, moment: Moment) -> None:
    before = await world.read()
    await stop_at(world, step, moment, KEPT)
    assert await world.read() == before
    report = await world.archive(KEPT)
    assert await world.read() == before
    await world.store.compact(report.through)
    assert await world.read() == before
    assert len(await world.objects()) == len(await world.keys_in("a"))


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(20))
async def test_stopped_in_retention(world: World, step: int, moment: Moment) -> None:
    await stop_at(world, step, moment, OPTIONS)
    await world.archive(OPTIONS)
    assert len(await world.objects()) == len(await world.keys_in("a"))


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(14))
async def test_stopped_in_merging(world: World, step: int, moment: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.archive()
    async with mounted(world.store) as volume:
        for number in range(5):
            await volume.mkdir(ROOT_INO, b"more%d" % number, 0o755, ME)
            await volume.settle()
            await world.archive()
    before, segments = await world.read(), len(await world.objects())
    monkeypatch.setattr(merging, "MERGED_AT_ONCE", 4)
    await stop_at(world, step, moment, ArchiveOptions())
    assert await world.read() == before
    await world.archive()
    assert await world.read() == before
    assert len(await world.objects()) == len(await world.keys_in("a")) < segments


@pytest.mark.parametrize("step", range(4))
async def test_stopped_before_and_after_an_object_is_stored(world: World, step: int) -> None:
    before: list[ChangeRecord] = await world.read()
    segments = world.segments()
    put, puts = segments.put, 0

    async def stopping_put(name: str, data: bytes) -> None:
        nonlocal puts
        puts += 1
        if puts > step // 2:
            if step % 2:
                await put(name, data)
            raise Stopped("by the test")
        await put(name, data)

    segments.put = stopping_put  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        await Archiver(world.store, KEYS, segments, KEPT).run(once=True)
    report = await world.archive(KEPT)
    assert report.orphans == step % 2
    assert await world.read() == before
    assert len(await world.objects()) == len(await world.keys_in("a")) == 3


async def test_one_that_begins_again_in_the_same_process(world: World) -> None:
    """What it has seen and not stored it sees again, and must not know of later moves before they come."""
    async with mounted(world.store) as volume:
        outer = (await volume.mkdir(ROOT_INO, b"outer", 0o755, ME)).ino
        await volume.settle()
        await world.archive()
        await volume.mkdir(outer, b"a", 0o755, ME)
        await volume.rename(ROOT_INO, b"outer", ROOT_INO, b"moved")
        await volume.mkdir(outer, b"b", 0o755, ME)
        await volume.settle()
    before = await world.read()
    assert [record.path for record in before[-3:]] == [b"/outer/a", b"/moved", b"/moved/b"]
    segments = world.segments()
    put, stops = segments.put, [True, False]

    async def stopping_put(name: str, data: bytes) -> None:
        if stops.pop(0):
            raise Stopped("by the test")
        await put(name, data)

    segments.put = stopping_put  # type: ignore[method-assign]
    archiver = Archiver(world.store, KEYS, segments, ArchiveOptions())
    with pytest.raises(Stopped):
        await archiver.run(once=True)
    await archiver.run(once=True)
    await world.store.compact(archiver.report.through)
    assert await world.read() == before
