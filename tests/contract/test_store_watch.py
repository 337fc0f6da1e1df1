"""The Store port's watches: one suite for memory and for a real etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import Compacted, StoreMisuse
from apollofs.metadata.store import NOW, Delete, Event, Put, Range, WatchBatch
from tests.contract.conftest import Place

pytestmark = pytest.mark.contract

BOUND_S = 60


async def put(place: Place, name: str, value: bytes = b"", lease: int = 0) -> int:
    return (await place.store.txn((), (Put(place.key(name), value, lease),))).revision


async def take(batches: AsyncIterator[WatchBatch], count: int) -> list[Event]:
    """The next `count` events. Batches must be in order, and whole."""
    events: list[Event] = []
    last = 0
    with trio.fail_after(BOUND_S):
        while len(events) < count:
            batch = await anext(batches)
            assert batch.revision > last
            assert all(last < event.kv.mod_revision <= batch.revision for event in batch.events)
            last = batch.revision
            events += batch.events
    assert len(events) == count
    return events


def short(place: Place, events: list[Event]) -> list[tuple[str, bytes]]:
    return [
        (("-" if event.deleted else "+") + event.kv.key.removeprefix(place.prefix).decode(), event.kv.value)
        for event in events
    ]


async def test_every_change_in_order(place: Place) -> None:
    first = await put(place, "a", b"1")
    await put(place, "b", b"2")
    await place.store.txn((), (Delete(place.key("a")), Put(place.key("c"), b"3")))
    async with place.store.watch(*place.all, start_revision=first) as batches:
        past = await take(batches, 4)
        assert short(place, past[:2]) == [("+a", b"1"), ("+b", b"2")]
        assert sorted(short(place, past[2:])) == [("+c", b"3"), ("-a", b"")]
        await put(place, "b", b"4")
        last = (await place.store.txn((), (Delete(*place.all),))).revision
        now = await take(batches, 3)
        assert short(place, now) == [("+b", b"4"), ("-b", b""), ("-c", b"")]
        assert {event.kv.mod_revision for event in now[1:]} == {last}


async def test_events_say_what_the_key_has_become(place: Place) -> None:
    lease = await place.store.lease_grant(600)
    created = await put(place, "a", b"1")
    changed = await put(place, "a", b"2", lease.id)
    deleted = (await place.store.txn((), (Delete(place.key("a")),))).revision
    async with place.store.watch(place.key("a"), start_revision=created) as batches:
        kvs = [event.kv for event in await take(batches, 3)]
    assert [(kv.create_revision, kv.mod_revision, kv.version, kv.lease) for kv in kvs] == [
        (created, created, 1, 0),
        (created, changed, 2, lease.id),
        (0, deleted, 0, 0),
    ]
    await place.store.lease_revoke(lease.id)


async def test_only_the_key_or_range_that_was_asked_for(place: Place) -> None:
    first = await put(place, "a")
    for name in ("aa", "b", "c", "b", "a"):
        await put(place, name)
    async with place.store.watch(place.key("a"), start_revision=first) as batches:
        assert short(place, await take(batches, 2)) == [("+a", b""), ("+a", b"")]
    async with place.store.watch(place.key("b"), place.key("c"), start_revision=first) as batches:
        assert short(place, await take(batches, 2)) == [("+b", b""), ("+b", b"")]


async def test_a_watch_ends_where_it_is_told(place: Place) -> None:
    first = await put(place, "a", b"1")
    await put(place, "a", b"2")
    last = (await place.store.txn((), (Put(b"elsewhere", b""),))).revision
    async with place.store.watch(*place.all, start_revision=first, last_revision=last) as batches:
        assert short(place, await take(batches, 2)) == [("+a", b"1"), ("+a", b"2")]
        await put(place, "a", b"3")
        with trio.fail_after(BOUND_S):
            rest = [batch async for batch in batches]
        assert [(batch.revision, batch.events) for batch in rest] in ([(last, ())], [])
    async with place.store.watch(*place.all, start_revision=first, last_revision=first) as batches:
        with trio.fail_after(BOUND_S):
            found = [batch async for batch in batches]
        assert [(batch.revision, short(place, list(batch.events))) for batch in found] == [(first, [("+a", b"1")])]
        with pytest.raises(StopAsyncIteration):
            await anext(batches)


async def test_many_watches_that_end_and_one_that_does_not(place: Place) -> None:
    revisions = [await put(place, "a", b"%d" % number) for number in range(20)]
    async with place.store.watch(*place.all, start_revision=revisions[0]) as endless:
        for number, revision in enumerate(revisions):
            last = revisions[min(number + 3, 19)]
            async with place.store.watch(*place.all, start_revision=revision, last_revision=last) as batches:
                with trio.fail_after(BOUND_S):
                    events = [event async for batch in batches for event in batch.events]
                assert [event.kv.mod_revision for event in events] == revisions[number : number + 4]
        assert len(await take(endless, 20)) == 20


async def test_a_watch_starts_where_it_is_told(place: Place) -> None:
    await put(place, "a", b"1")
    second = await put(place, "a", b"2")
    third = await put(place, "a", b"3")
    for start, expected in ((second, [b"2", b"3"]), (third, [b"3"])):
        async with place.store.watch(place.key("a"), start_revision=start) as batches:
            assert [event.kv.value for event in await take(batches, len(expected))] == expected


async def test_a_watch_may_start_in_the_future(place: Place) -> None:
    now = await put(place, "a", b"now")
    async with place.store.watch(place.key("a"), start_revision=now + 3) as batches, trio.open_nursery() as nursery:

        async def expect() -> None:
            assert [event.kv.value for event in await take(batches, 1)] == [b"third"]

        nursery.start_soon(expect)
        for value in (b"first", b"second", b"third"):
            await put(place, "a", value)


async def test_a_watch_that_needs_no_history_begins_now(place: Place) -> None:
    await put(place, "a", b"before")
    async with place.store.watch(place.key("a"), start_revision=NOW) as batches:
        begins = await anext(batches)
        found = await place.store.range(Range(place.key("a")))
        assert (begins.events, found.kvs[0].value) == ((), b"before")
        assert found.kvs[0].mod_revision <= begins.revision <= found.revision
        first = await put(place, "a", b"after")
        assert [(event.kv.mod_revision, event.kv.value) for event in await take(batches, 1)] == [(first, b"after")]


async def test_going_on_where_another_watch_ended(place: Place) -> None:
    start = await put(place, "a", b"0")
    for number in range(1, 30):
        await put(place, "a", b"%d" % number)
    seen: list[bytes] = []
    while len(seen) < 30:
        async with place.store.watch(place.key("a"), start_revision=start) as batches:
            with trio.fail_after(BOUND_S):
                batch = await anext(batches)
            seen += [event.kv.value for event in batch.events]
            start = batch.revision + 1
    assert seen == [b"%d" % number for number in range(30)]


async def test_history_that_is_owed_but_compacted(place: Place) -> None:
    first = await put(place, "a")
    await put(place, "a")
    third = (await place.store.txn((), (Delete(place.key("a")),))).revision
    await place.store.compact(third)
    for start in (1, first, third):
        async with place.store.watch(place.key("a"), start_revision=start) as batches:
            with trio.fail_after(BOUND_S), pytest.raises(Compacted) as caught:
                await anext(batches)
        assert caught.value.first_revision == third + 1
    async with place.store.watch(place.key("a"), start_revision=caught.value.first_revision) as batches:
        await put(place, "a", b"4")
        assert short(place, await take(batches, 1)) == [("+a", b"4")]


async def test_a_compaction_does_not_disturb_who_is_up_to_date(place: Place) -> None:
    revision = await put(place, "a", b"1")
    async with place.store.watch(place.key("a"), start_revision=revision) as batches:
        await take(batches, 1)
        await place.store.compact(revision)
        await put(place, "a", b"2")
        assert short(place, await take(batches, 1)) == [("+a", b"2")]


async def test_the_end_of_a_lease_is_seen(place: Place) -> None:
    lease = await place.store.lease_grant(1)
    await put(place, "a", b"", lease.id)
    revision = await put(place, "b", b"", lease.id)
    async with place.store.watch(*place.all, start_revision=revision + 1) as batches:
        events = await take(batches, 2)
    assert sorted(short(place, events)) == [("-a", b""), ("-b", b"")]
    assert len({event.kv.mod_revision for event in events}) == 1
    assert (await place.store.range(Range(*place.all))).count == 0
    assert await place.store.lease_keepalive(lease.id) == 0


async def test_many_watches_at_once(place: Place) -> None:
    watches, changes = 20, 10
    start = (await place.store.range(Range(*place.all))).revision + 1
    finished: list[int] = []

    async def follow(number: int) -> None:
        async with place.store.watch(place.key(f"{number:02}"), start_revision=start) as batches:
            events = await take(batches, changes)
        assert [event.kv.value for event in events] == [b"%d" % value for value in range(changes)]
        finished.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(watches):
            nursery.start_soon(follow, number)
        for value in range(changes):
            await place.store.txn((), [Put(place.key(f"{number:02}"), b"%d" % value) for number in range(watches)])
    assert sorted(finished) == list(range(watches))


async def test_a_slow_consumer_misses_nothing_and_holds_up_nobody(place: Place) -> None:
    """Twenty megabytes wait for a consumer that does not come; another watch goes on beside it."""
    size, count = 200_000, 100
    start = (await place.store.range(Range(*place.all))).revision + 1
    async with (
        place.store.watch(place.key("big"), start_revision=start) as slow,
        place.store.watch(place.key("small"), start_revision=start) as quick,
    ):
        await put(place, "big", b"first")
        assert [event.kv.value for event in await take(slow, 1)] == [b"first"]
        for number in range(count):
            await put(place, "big", b"%03d" % number + bytes(size))
            if number % 10 == 0:
                await put(place, "small", b"%03d" % number)
                assert [event.kv.value for event in await take(quick, 1)] == [b"%03d" % number]
        values = [event.kv.value for event in await take(slow, count)]
        assert [value[:3] for value in values] == [b"%03d" % number for number in range(count)]
        assert {len(value) for value in values} == {3 + size}


async def test_a_revision_is_never_split(place: Place) -> None:
    """Larger than what a server sends at once."""
    keys = [b"%03d" % number for number in range(100)]
    start = (await place.store.range(Range(*place.all))).revision + 1
    for _ in range(4):
        await place.store.txn((), [Put(place.key(name), bytes(14_000)) for name in keys])
    last = (await place.store.txn((), (Delete(*place.all),))).revision
    sizes: dict[int, int] = {}
    async with place.store.watch(*place.all, start_revision=start) as batches:
        with trio.fail_after(BOUND_S):
            while last not in sizes:
                batch = await anext(batches)
                for revision in {event.kv.mod_revision for event in batch.events}:
                    assert revision not in sizes
                    sizes[revision] = sum(event.kv.mod_revision == revision for event in batch.events)
    assert sizes == {start + number: len(keys) for number in range(5)}


async def test_a_cancelled_consumer(place: Place) -> None:
    start = await put(place, "a", b"1")
    async with place.store.watch(place.key("a"), start_revision=start) as batches:
        await take(batches, 1)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(anext, batches)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await put(place, "a", b"2")
        assert short(place, await take(batches, 1)) == [("+a", b"2")]
    async with place.store.watch(place.key("a"), start_revision=start) as batches:
        assert short(place, await take(batches, 2)) == [("+a", b"1"), ("+a", b"2")]


async def test_a_watch_needs_a_start(place: Place) -> None:
    for key, start in ((b"", 1), (place.key("a"), -1)):
        with pytest.raises(StoreMisuse):
            async with place.store.watch(key, start_revision=start):
                pass
