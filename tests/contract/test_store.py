"""The Store port's transactions, reads and leases: one suite for memory and for a real etcd."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import (
    Compacted,
    LeaseNotFound,
    RequestTooLarge,
    StoreError,
    StoreMisuse,
    StoreUnavailable,
)
from apollofs.metadata.store import (
    OPS_MAX,
    REQUEST_BYTES_MAX,
    Compare,
    Delete,
    Op,
    Put,
    Range,
    Relation,
    Target,
)
from tests.contract.conftest import Place

pytestmark = pytest.mark.contract

BOUND_S = 60


async def put(place: Place, name: bytes | str, value: bytes = b"", lease: int = 0) -> int:
    """Put one key; the revision."""
    return (await place.store.txn((), (Put(place.key(name), value, lease),))).revision


async def holds(place: Place, *compares: Compare) -> bool:
    return (await place.store.txn(compares, ())).succeeded


async def names(place: Place, revision: int = 0) -> list[bytes]:
    found = await place.store.range(Range(*place.all, revision=revision))
    return [kv.key.removeprefix(place.prefix) for kv in found.kvs]


# -- transactions -----------------------------------------------------------------------------------------------------


async def test_a_key_counts_its_versions(place: Place) -> None:
    first = await put(place, "a", b"1")
    second = await put(place, "a", b"2")
    assert second > first
    (kv,) = (await place.store.range(Range(place.key("a")))).kvs
    assert (kv.key, kv.value, kv.create_revision, kv.mod_revision) == (place.key("a"), b"2", first, second)
    assert (kv.version, kv.lease) == (2, 0)
    await place.store.txn((), (Delete(place.key("a")),))
    third = await put(place, "a", b"3")
    (kv,) = (await place.store.range(Range(place.key("a")))).kvs
    assert (kv.create_revision, kv.version) == (third, 1)


async def test_then_and_else(place: Place) -> None:
    absent = Compare(place.key("a"), Target.VERSION, Relation.EQUAL, 0)
    ops = (Put(place.key("a"), b"1"),), (Range(place.key("a")),)
    done = await place.store.txn((absent,), *ops)
    assert (done.succeeded, done.ranges) == (True, (None,))
    refused = await place.store.txn((absent,), *ops)
    assert not refused.succeeded
    assert refused.revision == done.revision
    (found,) = refused.ranges
    assert found is not None
    assert [kv.value for kv in found.kvs] == [b"1"]


async def test_all_compares_must_hold(place: Place) -> None:
    await put(place, "a")
    there = Compare(place.key("a"), Target.VERSION, Relation.EQUAL, 1)
    not_there = Compare(place.key("b"), Target.VERSION, Relation.EQUAL, 1)
    assert await holds(place, there, there)
    assert not await holds(place, there, not_there)
    assert await holds(place)


@pytest.mark.parametrize("target", [Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE])
async def test_compares_of_numbers(place: Place, target: Target) -> None:
    lease = await place.store.lease_grant(600)
    await put(place, "a", b"1", lease.id)
    await put(place, "a", b"2", lease.id)
    (kv,) = (await place.store.range(Range(place.key("a")))).kvs
    true = {
        Target.VERSION: kv.version,
        Target.CREATE: kv.create_revision,
        Target.MOD: kv.mod_revision,
        Target.LEASE: kv.lease,
    }[target]
    for operand in (true - 1, true, true + 1):
        expected = (true == operand, true > operand, true < operand, true != operand)
        for relation, outcome in zip(Relation, expected, strict=True):
            assert await holds(place, Compare(place.key("a"), target, relation, operand)) is outcome
    await place.store.lease_revoke(lease.id)


@pytest.mark.parametrize("target", [Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE])
async def test_an_absent_key_has_zeros(place: Place, target: Target) -> None:
    for end in (b"", place.key("b")):
        assert await holds(place, Compare(place.key("a"), target, Relation.EQUAL, 0, end))
        assert await holds(place, Compare(place.key("a"), target, Relation.LESS, 1, end))
        assert not await holds(place, Compare(place.key("a"), target, Relation.GREATER, 0, end))
        assert not await holds(place, Compare(place.key("a"), target, Relation.NOT_EQUAL, 0, end))


async def test_compares_of_values(place: Place) -> None:
    await put(place, "a", b"m\xff")
    for operand in (b"m", b"m\xff", b"m\xff\0", b"n", b""):
        true = b"m\xff"
        expected = (true == operand, true > operand, true < operand, true != operand)
        for relation, outcome in zip(Relation, expected, strict=True):
            assert await holds(place, Compare(place.key("a"), Target.VALUE, relation, operand)) is outcome


async def test_a_value_compare_on_an_absent_key_is_false(place: Place) -> None:
    for relation in Relation:
        assert not await holds(place, Compare(place.key("a"), Target.VALUE, relation, b""))
        assert not await holds(place, Compare(place.key("a"), Target.VALUE, relation, b"x", place.key("b")))


async def test_a_range_compare_holds_for_every_key(place: Place) -> None:
    for name in ("b1", "b2", "c"):
        await put(place, name, b"v")
    await put(place, "b2", b"v")
    start, end = place.key("b"), place.key("c")
    assert await holds(place, Compare(start, Target.VERSION, Relation.GREATER, 0, end))
    assert not await holds(place, Compare(start, Target.VERSION, Relation.EQUAL, 1, end))
    assert await holds(place, Compare(start, Target.VALUE, Relation.EQUAL, b"v", end))
    assert not await holds(place, Compare(start, Target.CREATE, Relation.EQUAL, 0, end))
    await place.store.txn((), (Delete(start, end),))
    assert await holds(place, Compare(start, Target.CREATE, Relation.EQUAL, 0, end))


async def test_one_revision_for_a_whole_transaction(place: Place) -> None:
    await put(place, "gone")
    done = await place.store.txn(
        (), (Put(place.key("a"), b"1"), Put(place.key("b"), b"2"), Delete(place.key("gone")), Range(*place.all))
    )
    found = done.ranges[3]
    assert found is not None
    assert done.ranges[:3] == (None, None, None)
    assert [(kv.key, kv.mod_revision) for kv in found.kvs] == [
        (place.key("a"), done.revision),
        (place.key("b"), done.revision),
    ]
    assert found.revision == done.revision


async def test_reads_see_the_writes_before_them(place: Place) -> None:
    await put(place, "a", b"old")
    done = await place.store.txn(
        (), (Range(place.key("a")), Put(place.key("a"), b"new"), Range(place.key("a")), Range(*place.all))
    )
    values = [[kv.value for kv in found.kvs] for found in done.ranges if found is not None]
    assert values == [[b"old"], [b"new"], [b"new"]]


async def test_what_changes_nothing_makes_no_revision(place: Place) -> None:
    before = await put(place, "a")
    absent = Delete(place.key("x"), place.key("y"))
    assert (await place.store.txn((), (absent, Range(place.key("a"))))).revision == before
    assert (await place.store.txn((), ())).revision == before


async def test_a_range_of_keys_is_deleted(place: Place) -> None:
    for name in ("a", "b", "c", "d"):
        await put(place, name)
    await place.store.txn((), (Delete(place.key("b"), place.key("d")),))
    assert await names(place) == [b"a", b"d"]


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_as_many_operations_as_fit(place: Place) -> None:
    puts = tuple(Put(place.key(b"%03d" % number), b"") for number in range(OPS_MAX))
    compares = tuple(Compare(op.key, Target.VERSION, Relation.EQUAL, 0) for op in puts)
    reads = tuple(Range(op.key) for op in puts)
    assert (await place.store.txn(compares, puts, reads)).succeeded
    again = await place.store.txn(compares, puts, reads)
    assert not again.succeeded
    assert len([found for found in again.ranges if found and found.kvs]) == OPS_MAX


@pytest.mark.parametrize("part", ["compares", "then", "else"])
async def test_too_many_operations(place: Place, part: str) -> None:
    count = OPS_MAX + 1
    puts: tuple[Op, ...] = tuple(Put(place.key(b"%03d" % number), b"") for number in range(count))
    compares = tuple(Compare(op.key, Target.VERSION, Relation.EQUAL, 0) for op in puts)
    with pytest.raises(RequestTooLarge):
        await place.store.txn(
            compares if part == "compares" else (), puts if part == "then" else (), puts if part == "else" else ()
        )
    assert await names(place) == []


async def test_as_many_bytes_as_fit(place: Place) -> None:
    value = bytes(REQUEST_BYTES_MAX - 1000)
    await put(place, "a", value)
    (kv,) = (await place.store.range(Range(place.key("a")))).kvs
    assert kv.value == value
    with pytest.raises(RequestTooLarge):
        await put(place, "b", bytes(REQUEST_BYTES_MAX))
    assert await names(place) == [b"a"]


@pytest.mark.parametrize("branch", ["then", "else"])
async def test_one_key_changes_once(place: Place, branch: str) -> None:
    key = place.key("k")
    for ops in (
        (Put(key, b"1"), Put(key, b"2")),
        (Put(key, b"1"), Delete(key)),
        (Delete(*place.all), Put(key, b"1")),
    ):
        with pytest.raises(StoreMisuse):
            await (place.store.txn((), ops) if branch == "then" else place.store.txn((), (), ops))
    assert await names(place) == []
    await place.store.txn((), (Delete(key), Delete(key)))


async def test_misuse_is_refused(place: Place) -> None:
    for ops in ((Put(b"", b""),), (Range(place.key("a"), revision=1),)):
        with pytest.raises(StoreMisuse):
            await place.store.txn((), ops)
    with pytest.raises(StoreMisuse):
        await place.store.range(Range(b""))


# -- reads ------------------------------------------------------------------------------------------------------------


async def test_a_range_is_in_byte_order(place: Place) -> None:
    wild = [b"\0", b"\0\0", b"\x7f", b"\x80", b"/", b"a", b"a\0", b"ab", b"\xff", b"\xff\xff"]
    for name in reversed(wild):
        await put(place, name, name)
    assert await names(place) == sorted(wild)
    found = await place.store.range(Range(place.key(b"a"), place.key(b"\x80")))
    assert [kv.value for kv in found.kvs] == [b"a", b"a\0", b"ab", b"\x7f"]


async def test_paging(place: Place) -> None:
    wanted = [b"%02d" % number for number in range(25)]
    for name in wanted:
        await put(place, name)
    start, end = place.all
    seen: list[bytes] = []
    while True:
        found = await place.store.range(Range(start, end, limit=10))
        assert found.count == len(wanted) - len(seen)
        seen += [kv.key.removeprefix(place.prefix) for kv in found.kvs]
        if not found.more:
            break
        assert len(found.kvs) == 10
        start = found.kvs[-1].key + b"\0"
    assert seen == wanted
    exact = await place.store.range(Range(*place.all, limit=len(wanted)))
    assert (len(exact.kvs), exact.more) == (25, False)


async def test_keys_only_and_count_only(place: Place) -> None:
    revision = await put(place, "a", b"value")
    (kv,) = (await place.store.range(Range(*place.all, keys_only=True))).kvs
    assert (kv.key, kv.value, kv.mod_revision) == (place.key("a"), b"", revision)
    counted = await place.store.range(Range(*place.all, count_only=True))
    assert (counted.kvs, counted.count) == ((), 1)
    nothing = await place.store.range(Range(place.key("x")))
    assert (nothing.kvs, nothing.more, nothing.count) == ((), False, 0)
    assert nothing.revision == revision


async def test_older_states(place: Place) -> None:
    first = await put(place, "a", b"1")
    second = await put(place, "b", b"2")
    third = (await place.store.txn((), (Delete(place.key("a")), Put(place.key("b"), b"3")))).revision
    assert await names(place, first) == [b"a"]
    assert await names(place, second) == [b"a", b"b"]
    assert await names(place, third) == await names(place) == [b"b"]
    (old,) = (await place.store.range(Range(place.key("b"), revision=second))).kvs
    assert (old.value, old.version) == (b"2", 1)
    found = await place.store.range(Range(place.key("b"), revision=second))
    assert found.revision == third
    with pytest.raises(StoreMisuse):
        await names(place, third + 1000)


async def test_compaction(place: Place) -> None:
    first = await put(place, "a", b"1")
    second = await put(place, "a", b"2")
    third = (await place.store.txn((), (Delete(place.key("a")), Put(place.key("b"), b"3")))).revision
    await place.store.compact(second)
    with pytest.raises(Compacted):
        await names(place, first)
    assert await names(place, second) == [b"a"]
    await place.store.compact(third)
    with pytest.raises(Compacted):
        await names(place, second)
    assert await names(place, third) == await names(place) == [b"b"]
    with pytest.raises(Compacted):
        await place.store.compact(third)
    with pytest.raises(StoreMisuse):
        await place.store.compact(third + 1000)


# -- leases -----------------------------------------------------------------------------------------------------------


async def test_a_revoked_lease_takes_its_keys(place: Place) -> None:
    lease = await place.store.lease_grant(600)
    assert lease.ttl_s == 600
    other = await place.store.lease_grant(600)
    assert other.id != lease.id
    await put(place, "a", b"", lease.id)
    await put(place, "b", b"", lease.id)
    await put(place, "kept", b"", other.id)
    await put(place, "moved", b"", lease.id)
    await put(place, "moved")
    before = await place.store.range(Range(*place.all))
    assert {kv.key.removeprefix(place.prefix): kv.lease for kv in before.kvs} == {
        b"a": lease.id,
        b"b": lease.id,
        b"kept": other.id,
        b"moved": 0,
    }
    await place.store.lease_revoke(lease.id)
    after = await place.store.range(Range(*place.all))
    assert [kv.key.removeprefix(place.prefix) for kv in after.kvs] == [b"kept", b"moved"]
    assert after.revision == before.revision + 1
    await place.store.lease_revoke(lease.id)
    await place.store.lease_revoke(other.id)


async def test_keeping_a_lease_alive(place: Place) -> None:
    lease = await place.store.lease_grant(600)
    assert await place.store.lease_keepalive(lease.id) == 600
    await place.store.lease_revoke(lease.id)
    assert await place.store.lease_keepalive(lease.id) == 0


async def test_a_put_with_an_ended_lease_changes_nothing(place: Place) -> None:
    lease = await place.store.lease_grant(600)
    await place.store.lease_revoke(lease.id)
    ops = (Put(place.key("a"), b""), Put(place.key("b"), b"", lease.id))
    with pytest.raises(LeaseNotFound):
        await place.store.txn((), ops)
    assert await names(place) == []
    # only the branch that runs counts
    absent = Compare(place.key("a"), Target.VERSION, Relation.EQUAL, 0)
    assert (await place.store.txn((absent,), (), ops)).succeeded


# -- many at once, and giving up --------------------------------------------------------------------------------------


async def test_increments_of_many_tasks_all_count(place: Place) -> None:
    tasks, times, key = 8, 10, place.key("counter")
    await put(place, "counter", b"0")

    async def increment() -> None:
        for _ in range(times):
            while True:
                (kv,) = (await place.store.range(Range(key))).kvs
                unchanged = Compare(key, Target.MOD, Relation.EQUAL, kv.mod_revision)
                if (await place.store.txn((unchanged,), (Put(key, b"%d" % (int(kv.value) + 1)),))).succeeded:
                    break

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(increment)
    (kv,) = (await place.store.range(Range(key))).kvs
    assert (int(kv.value), kv.version) == (tasks * times, tasks * times + 1)


async def test_a_cancelled_call_leaves_the_store_usable(place: Place) -> None:
    for _ in range(20):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(place.store.txn, (), (Put(place.key("a"), b"x"),))
                nursery.start_soon(place.store.range, Range(*place.all))
                await trio.lowlevel.checkpoint()
                scope.cancel()
    with trio.CancelScope() as scope:
        scope.cancel()
        await place.store.txn((), (Put(place.key("never"), b""),))
    assert scope.cancelled_caught
    await put(place, "b")
    assert b"never" not in await names(place)


async def test_every_call_is_a_checkpoint(place: Place) -> None:
    lease = await place.store.lease_grant(600)
    with trio.testing.assert_checkpoints():
        await place.store.txn((), ())
    with trio.testing.assert_checkpoints():
        await place.store.range(Range(place.key("a")))
    with trio.testing.assert_checkpoints():
        await place.store.lease_keepalive(lease.id)
    await place.store.lease_revoke(lease.id)


async def test_a_closed_store_refuses(place: Place) -> None:
    await put(place, "a")
    await place.store.aclose()
    with pytest.raises(StoreUnavailable):
        await place.store.range(Range(place.key("a")))
    with pytest.raises(StoreUnavailable):
        await put(place, "b")
    with pytest.raises(StoreError):
        async with place.store.watch(*place.all, start_revision=1) as batches:
            await anext(batches)
