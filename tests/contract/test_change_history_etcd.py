"""The history of the change log in lanes, on the memory store and on a real etcd: the same as one watch tells."""

from __future__ import annotations

import itertools

import pytest
import trio

from apollofs.metadata.changes import history
from apollofs.metadata.changes.history import mark_end, watched_slots
from apollofs.metadata.errors import Compacted
from apollofs.metadata.format import format_volume
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Event, Put, Store
from tests.contract.conftest import Place

pytestmark = pytest.mark.contract
_NUMBERS = itertools.count(1)
REVISIONS = 300


async def made(store: Store) -> tuple[Keys, int]:
    """A volume with a history; its keys, and where that begins."""
    keys = Keys(f"history-{next(_NUMBERS)}")
    await format_volume(store, keys.volume, site_name="here", site_store=(("kind", "memory"),))
    start = await mark_end(store, keys)
    for number in range(REVISIONS):
        key = keys.slot(1, number % 3) if number % 50 < 30 else b"apollofs/between"
        await store.txn((), [Put(key, b"%d" % number)])
    return keys, start


async def told(store: Store, keys: Keys, start: int, end: int) -> list[Event]:
    events: list[Event] = []
    async with watched_slots(store, keys, start) as batches:
        async for batch in batches:
            events += batch.events
            if batch.revision >= end:
                break
    return [event for event in events if event.kv.mod_revision <= end]


@pytest.mark.parametrize("lanes", [1, 4, 32])
async def test_lanes_tell_the_same(place: Place, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, start = await made(place.store)
    end = await mark_end(place.store, keys)
    with trio.fail_after(60):
        one = await told(place.store, keys, start, end)
        monkeypatch.setattr(history, "LAG_MIN", 0)
        monkeypatch.setattr(history, "LANES_MAX", lanes)
        monkeypatch.setattr(history, "LANE_REVISIONS", 20)
        assert await told(place.store, keys, start, end) == one
        assert len(one) > REVISIONS / 2
        await place.store.compact(start + 10)
        with pytest.raises(Compacted):
            await told(place.store, keys, start, end)
        assert await told(place.store, keys, start + 11, end) == one[11:]
