"""The history of the slots in lanes: what one watch would tell, in its order, nothing twice and nothing left out."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import trio

from apollofs.metadata.changes import history
from apollofs.metadata.changes.history import mark_end, watched_slots
from apollofs.metadata.errors import Compacted
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Event, Put, WatchBatch
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, mounted


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """With slots that others' revisions lie between; some lanes have nothing in them."""
    monkeypatch.setattr(history, "LANE_REVISIONS", 7)
    monkeypatch.setattr(history, "LANES_MAX", 4)
    rng = random.Random(1)
    async with made_world() as world, mounted(world.store) as volume:
        for number in range(40):
            await volume.mkdir(ROOT_INO, b"d%d" % number, 0o755, ME)
            await volume.settle()
            for _ in range(rng.choice([0, 0, 0, 3, 20])):
                await world.store.txn((), [Put(b"apollofs/other/S", b"")])
        yield world


async def told(world: World, start: int, end: int, *, lag: int, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Everything up to a revision at which something happened."""
    monkeypatch.setattr(history, "LAG_MIN", lag)
    events: list[Event] = []
    reached = start - 1
    async with watched_slots(world.store, KEYS, start) as batches:
        async for batch in batches:
            assert batch.revision > reached
            assert all(reached < event.kv.mod_revision <= batch.revision for event in batch.events)
            reached = batch.revision
            events += batch.events
            if reached >= end:
                return [event for event in events if event.kv.mod_revision <= end]
    raise AssertionError("a watch has ended")


async def test_lanes_tell_what_one_watch_tells(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await mark_end(world.store, KEYS)
    with trio.fail_after(60):
        for start in (1, 2, 5, 8, 50, end - 10, end):
            one = await told(world, start, end, lag=1 << 40, monkeypatch=monkeypatch)
            assert await told(world, start, end, lag=0, monkeypatch=monkeypatch) == one
            assert one


async def test_they_go_on_with_what_comes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LAG_MIN", 0)
    with trio.fail_after(60):
        async with watched_slots(world.store, KEYS, 1) as batches:
            for _ in range(20):
                end = await mark_end(world.store, KEYS)
                async for batch in batches:
                    if batch.revision >= end:
                        break


async def test_who_stops_waiting_may_ask_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await mark_end(world.store, KEYS)
    whole = await told(world, 1, end, lag=1 << 40, monkeypatch=monkeypatch)
    monkeypatch.setattr(history, "LAG_MIN", 0)
    rng, events, reached = random.Random(2), list[Event](), 0

    async def stop(scope: trio.CancelScope) -> None:
        for _ in range(rng.randrange(6)):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def ask(batches: AsyncIterator[WatchBatch]) -> WatchBatch | None:
        found: list[WatchBatch] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, nursery.cancel_scope)
            found.append(await anext(batches))
            nursery.cancel_scope.cancel()
        return found[0] if found else None

    with trio.fail_after(60):
        async with watched_slots(world.store, KEYS, 1) as batches:
            while reached < end:
                batch = await ask(batches)
                if batch is not None:
                    reached = batch.revision
                    events += batch.events
    assert [event for event in events if event.kv.mod_revision <= end] == whole


@pytest.mark.parametrize("lag", [0, 1 << 40])
async def test_what_is_forgotten_is_told(world: World, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await mark_end(world.store, KEYS)
    await world.store.compact(end - 30)
    with pytest.raises(Compacted):
        await told(world, 5, end, lag=lag, monkeypatch=monkeypatch)
    assert await told(world, end - 29, end, lag=lag, monkeypatch=monkeypatch)
