"""Retry, limit and metrics on a store that fails on purpose; time is trio's, and stands still for the tests."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from apollofs.blobstore import (
    BlobMetrics,
    BlobStoreRefused,
    BlobStoreTimeout,
    BlobStoreUnavailable,
    CorruptBlob,
    Limits,
    NoSuchBlob,
    RetryPolicy,
    hurried,
)
from apollofs.blobstore.limit import LimitingStore
from apollofs.blobstore.memory import MemoryStore
from apollofs.blobstore.metrics import MeteringStore
from apollofs.blobstore.retry import RetryingStore
from apollofs.blobstore.verify import VerifyingStore


class Flaky(MemoryStore):
    """Raises what stands in `errors`, one a read; then waits for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.calls = 0
        self.waiting = 0
        self.gate = trio.Event()
        self.gate.set()

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        return await super().read(name, offset, length)


def retrying(inner: Flaky, policy: RetryPolicy) -> RetryingStore:
    return RetryingStore(VerifyingStore(inner), policy, jitter=lambda: 0.5)


async def test_backoff_doubles_until_the_deadline(autojump_clock: MockClock) -> None:
    inner = Flaky()
    store = retrying(inner, RetryPolicy(deadline_s=10.0, first_backoff_s=1.0, backoff_max_s=4.0))
    inner.errors = [BlobStoreUnavailable(str(number)) for number in range(100)]
    with pytest.raises(BlobStoreUnavailable, match=r"^4$"):
        await store.read("n")
    # Pauses of 0.75, 1.5, 3 and 3 s; another 3 s would end after the deadline.
    assert inner.calls == 5


async def test_who_is_hurried_gives_up_rather_than_wait_for_long(autojump_clock: MockClock) -> None:
    inner = Flaky()
    store = retrying(inner, RetryPolicy(deadline_s=10.0, first_backoff_s=0.1, backoff_max_s=4.0))
    inner.errors = [BlobStoreUnavailable(str(number)) for number in range(100)]
    with hurried(0.2), pytest.raises(BlobStoreUnavailable, match=r"^2$"):
        await store.read("n")
    # Pauses of 0.075 and 0.15 s; the next would be 0.3 s.
    assert inner.calls == 3
    with pytest.raises(BlobStoreUnavailable, match=r"^10$"):
        await store.read("n")


@pytest.mark.parametrize("error", [BlobStoreRefused("no"), NoSuchBlob("none"), ValueError("a bug")])
async def test_what_will_not_help_is_not_repeated(error: Exception) -> None:
    inner = Flaky()
    inner.errors = [error]
    with pytest.raises(type(error)):
        await retrying(inner, RetryPolicy()).read("n")
    assert inner.calls == 1


async def test_an_attempt_that_hangs_ends_with_the_deadline(autojump_clock: MockClock) -> None:
    inner = Flaky()
    inner.gate = trio.Event()
    inner.errors = [BlobStoreUnavailable("earlier")]
    with pytest.raises(BlobStoreTimeout, match="did not end within 3 s; before that: earlier"):
        await retrying(inner, RetryPolicy(deadline_s=3.0)).read("n")


@pytest.mark.expects_log("corrupt data")
async def test_corrupt_reads_are_repeated_a_few_times() -> None:
    inner = Flaky()
    store = retrying(inner, RetryPolicy(corrupt_rereads_max=2))
    await store.put("n", b"body")
    inner.errors = [CorruptBlob("1"), CorruptBlob("2")]
    assert await store.read("n") == b"body"
    inner.errors = [CorruptBlob("1"), CorruptBlob("2"), CorruptBlob("3")]
    with pytest.raises(CorruptBlob, match="3"):
        await store.read("n")


async def test_limits_hold_and_give_back() -> None:
    inner = Flaky()
    store = LimitingStore(VerifyingStore(inner), Limits(reads_max=3, read_bytes_max=100, unknown_read_bytes=40))
    await store.put("n", b"body")
    inner.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(store.read, "n")
        await wait_all_tasks_blocked()
        assert inner.waiting == 2  # 40 bytes each: the third waits
        nursery.cancel_scope.cancel()
    inner.gate.set()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(store.read, "n")
    assert store._reads._bytes_free == 100
    assert not store._reads._waiting


async def test_one_read_larger_than_the_limit_goes_alone() -> None:
    store = LimitingStore(VerifyingStore(MemoryStore()), Limits(read_bytes_max=10, write_bytes_max=10))
    await store.put("n", bytes(100))
    assert await store.read("n") == bytes(100)


async def test_metrics_count_outcomes_and_bytes() -> None:
    metrics = BlobMetrics()
    store = MeteringStore(VerifyingStore(MemoryStore()), metrics)
    await store.put("n", bytes(100))
    await store.read("n")
    await store.read_block("n", 100, 10, 20)
    with pytest.raises(NoSuchBlob):
        await store.read("none")
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.stat("n")
    assert [found.name async for found in store.list()] == ["n"]
    found = metrics.snapshot()
    assert found.calls == {
        ("put", "ok"): 1,
        ("read", "ok"): 2,
        ("read", "NoSuchBlob"): 1,
        ("stat", "cancelled"): 1,
        ("list", "ok"): 1,
    }
    assert (found.bytes_written, found.bytes_read, found.in_flight) == (100, 120, 0)
