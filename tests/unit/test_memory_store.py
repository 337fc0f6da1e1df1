"""What tests rely on beyond the contract: hooks, shared handles, a clock of their own, counted requests."""

from __future__ import annotations

import pytest
import trio

from apollofs.metadata.counting import CountingStore, Counts
from apollofs.metadata.errors import OutcomeUnknown, StoreUnavailable
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.store import Compare, Put, Range, Relation, Target


async def test_a_hook_before_prevents() -> None:
    store = MemoryStore()

    async def unreachable(moment: Moment, request: Request) -> None:
        if moment is Moment.BEFORE and request.method == "txn":
            raise StoreUnavailable("no")

    store.hook = unreachable
    with pytest.raises(StoreUnavailable):
        await store.txn((), (Put(b"a", b""),))
    assert (await store.range(Range(b"a"))).count == 0


async def test_a_hook_after_loses_the_reply() -> None:
    async def lose(moment: Moment, request: Request) -> None:
        if moment is Moment.AFTER and request.method == "txn":
            raise OutcomeUnknown("lost")

    store = MemoryStore(hook=lose)
    with pytest.raises(OutcomeUnknown):
        await store.txn((), (Put(b"a", b"1"),))
    assert (await store.range(Range(b"a"))).kvs[0].value == b"1"


async def test_handles_share_data_but_not_hooks_or_their_end() -> None:
    async def unreachable(moment: Moment, request: Request) -> None:
        raise StoreUnavailable("no")

    one = MemoryStore()
    other = one.another()
    cut_off = one.another(unreachable)
    async with other.watch(b"a", start_revision=1) as batches:
        await one.txn((), (Put(b"a", b"1"),))
        with trio.fail_after(5):
            assert [event.kv.value for event in (await anext(batches)).events] == [b"1"]
    with pytest.raises(StoreUnavailable):
        await cut_off.range(Range(b"a"))
    await one.aclose()
    with pytest.raises(StoreUnavailable):
        await one.range(Range(b"a"))
    assert (await other.range(Range(b"a"))).count == 1


async def test_leases_end_by_the_given_clock() -> None:
    now_s = 100.0
    store = MemoryStore(clock=lambda: now_s)
    lease = await store.lease_grant(10)
    await store.txn((), (Put(b"a", b"", lease.id),))
    now_s += 9
    assert await store.lease_keepalive(lease.id) == 10
    now_s += 9
    assert (await store.range(Range(b"a"))).count == 1
    async with store.watch(b"a", start_revision=(await store.range(Range(b"a"))).revision + 1) as batches:
        now_s += 1
        store.expire_leases()
        with trio.fail_after(5):
            (event,) = (await anext(batches)).events
        assert event.deleted
    assert await store.lease_keepalive(lease.id) == 0


async def test_compaction_forgets_deleted_keys() -> None:
    store = MemoryStore()
    lease = await store.lease_grant(10)
    for _ in range(3):
        await store.txn((), (Put(b"a", b"", lease.id), Put(b"b", b"")))
    await store.lease_revoke(lease.id)
    revision = (await store.range(Range(b"a"))).revision
    await store.compact(revision)
    assert (await store.range(Range(b"a", b"c", revision=revision))).count == 1


async def test_counts() -> None:
    store = CountingStore(MemoryStore())
    absent = Compare(b"a", Target.VERSION, Relation.EQUAL, 0)
    await store.txn((absent, absent), (Put(b"a", b""),), (Range(b"a"), Range(b"b")))
    await store.range(Range(b"a"))
    lease = await store.lease_grant(10)
    await store.lease_keepalive(lease.id)
    await store.lease_revoke(lease.id)
    async with store.watch(b"a", start_revision=1):
        pass
    assert store.snapshot() == Counts(
        txn=1, range=1, watch=1, lease_grant=1, lease_keepalive=1, lease_revoke=1, compares=2, ops=3
    )
    assert store.requests == 2
    store.reset()
    assert store.snapshot() == Counts()
    await store.aclose()
