"""Counting what happens in a blob store: calls by method and outcome, their time, bytes, repetitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from .block_port import BlockStore
from .errors import BlobStoreError
from .footer import Footer
from .listing import closing
from .port import BlobStat, Buffer
from .retry import Method

T = TypeVar("T")

OK = "ok"
CANCELLED = "cancelled"
BUG = "bug"
"""The outcome of a call that raised what is no `BlobStoreError`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counts since the start. Outcomes are `ok`, `cancelled`, `bug`, or the name of an error's class."""

    calls: Mapping[tuple[Method, str], int]
    """By method and outcome. A listing counts as one call."""
    seconds: Mapping[tuple[Method, str], float]
    """Sums of latencies, waiting and repetitions included; of a listing, without its consumer's time."""
    retries: Mapping[tuple[Method, str], int]
    """By method and the class of the error that was the cause."""
    bytes_read: int
    bytes_written: int
    """Of data, successful calls only."""
    in_flight: int


class BlobMetrics:
    """The counters of one stack of stores; bounded by methods times error classes."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[Method, str]] = Counter()
        self._seconds: Counter[tuple[Method, str]] = Counter()
        self._retries: Counter[tuple[Method, str]] = Counter()
        self._bytes_read = 0
        self._bytes_written = 0
        self._in_flight = 0

    def snapshot(self) -> Snapshot:
        """A copy of the counters as of now."""
        return Snapshot(
            dict(self._calls),
            dict(self._seconds),
            dict(self._retries),
            self._bytes_read,
            self._bytes_written,
            self._in_flight,
        )

    def retried(self, method: Method, error: BlobStoreError) -> None:
        """For `RetryingStore(on_retry=...)`."""
        self._retries[method, type(error).__name__] += 1

    def add_read(self, count: int) -> None:
        self._bytes_read += count

    def add_written(self, count: int) -> None:
        self._bytes_written += count

    def ended(self, method: Method, outcome: str, seconds: float) -> None:
        self._calls[method, outcome] += 1
        self._seconds[method, outcome] += seconds  # type: ignore[assignment]  # a Counter of floats works

    @contextmanager
    def timed(self, method: Method) -> Iterator[None]:
        """Count the block as one call."""
        begin = trio.current_time()
        outcome = BUG
        self._in_flight += 1
        try:
            yield
            outcome = OK
        except BaseException as exc:
            outcome = outcome_of(exc)
            raise
        finally:
            self._in_flight -= 1
            self.ended(method, outcome, trio.current_time() - begin)


class MeteringStore(BlockStore):
    """See `block_port.BlockStore`. Counts into `metrics`."""

    def __init__(self, inner: BlockStore, metrics: BlobMetrics) -> None:
        self._inner = inner
        self._metrics = metrics

    async def put(self, name: str, data: Buffer) -> None:
        with self._metrics.timed("put"):
            await self._inner.put(name, data)
        self._metrics.add_written(len(data))

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        with self._metrics.timed("put"):
            await self._inner.put_sealed(name, sealed)
        self._metrics.add_written(len(sealed))

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self._metrics.timed("read"):
            found = await self._inner.read(name, offset, length)
        self._metrics.add_read(len(found))
        return found

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        with self._metrics.timed("read"):
            found = await self._inner.read_block(name, data_length, offset, length)
        self._metrics.add_read(len(found))
        return found

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        with self._metrics.timed("read"):
            found = await self._inner.fetch_block(name, data_length, then)
        self._metrics.add_read(data_length)
        return found

    async def stat(self, name: str) -> BlobStat:
        with self._metrics.timed("stat"):
            return await self._inner.stat(name)

    async def delete(self, name: str) -> None:
        with self._metrics.timed("delete"):
            await self._inner.delete(name)

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        outcome, seconds = OK, 0.0
        try:
            async with closing(self._inner.list(prefix, start_after)) as found:
                while True:
                    begin = trio.current_time()
                    try:
                        entry = await anext(found)
                    except StopAsyncIteration:
                        return
                    finally:
                        seconds += trio.current_time() - begin
                    yield entry
        except GeneratorExit:
            raise  # the consumer has seen enough
        except BaseException as exc:
            outcome = outcome_of(exc)
            raise
        finally:
            self._metrics.ended("list", outcome, seconds)

    async def aclose(self) -> None:
        await self._inner.aclose()


def outcome_of(exc: BaseException) -> str:
    """The outcome that `exc` is counted as."""
    if isinstance(exc, BlobStoreError):
        return type(exc).__name__
    return CANCELLED if isinstance(exc, trio.Cancelled) else BUG
