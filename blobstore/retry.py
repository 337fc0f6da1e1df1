"""Trying again: the one place of the package where a request is repeated.

Repeating is always safe here: names are never reused for other bytes, so a put that took place and whose answer was
lost is put again with the same effect.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, TypeVar

import trio

from .block_port import BlockStore
from .errors import BlobStoreError, BlobStoreTimeout, BlobStoreUnavailable, CorruptBlob
from .footer import Footer
from .listing import closing
from .port import BlobStat, Buffer

T = TypeVar("T")
Method: TypeAlias = Literal["put", "read", "stat", "delete", "list"]
OnRetry: TypeAlias = Callable[[Method, BlobStoreError], None]

log: Final = logging.getLogger(__name__)
_pause_max_s: Final[ContextVar[float]] = ContextVar("pause_max_s", default=math.inf)


@contextmanager
def hurried(pause_max_s: float) -> Iterator[None]:
    """What this task calls in the block is given up rather than tried again after a longer pause than that."""
    token = _pause_max_s.set(pause_max_s)
    try:
        yield
    finally:
        _pause_max_s.reset(token)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often."""

    deadline_s: float = 60.0
    """From the call's begin; a listing has it for each object anew."""
    first_backoff_s: float = 0.05
    backoff_max_s: float = 5.0
    corrupt_rereads_max: int = 2
    """Bytes damaged on their way are right when read again; bytes damaged at rest never are."""

    def __post_init__(self) -> None:
        assert self.deadline_s > 0
        assert 0 < self.first_backoff_s <= self.backoff_max_s
        assert 0 <= self.corrupt_rereads_max <= 10


class RetryingStore(BlockStore):
    """See `block_port.BlockStore`. Repeats `BlobStoreUnavailable` until the deadline, then raises the last error;
    repeats reads that found `CorruptBlob` a few times; everything else is raised at once.

    `on_retry` is told of each repetition (method, cause). `jitter` gives numbers in [0, 1).
    """

    def __init__(
        self,
        inner: BlockStore,
        policy: RetryPolicy,
        *,
        on_retry: OnRetry = lambda method, error: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._inner = inner
        self._policy = policy
        self._on_retry = on_retry
        self._jitter = jitter

    async def put(self, name: str, data: Buffer) -> None:
        await self._repeat("put", name, lambda: self._inner.put(name, data))

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        await self._repeat("put", name, lambda: self._inner.put_sealed(name, sealed))

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return await self._repeat("read", name, lambda: self._inner.read(name, offset, length))

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        return await self._repeat("read", name, lambda: self._inner.read_block(name, data_length, offset, length))

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        return await self._repeat("read", name, lambda: self._inner.fetch_block(name, data_length, then))

    async def stat(self, name: str) -> BlobStat:
        return await self._repeat("stat", name, lambda: self._inner.stat(name))

    async def delete(self, name: str) -> None:
        await self._repeat("delete", name, lambda: self._inner.delete(name))

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        """As the port says. After a failure it goes on behind the last object that was delivered."""
        last = start_after
        attempts = _Attempts(self._policy, self._jitter)
        while True:
            async with closing(self._inner.list(prefix, last)) as found:
                while True:
                    try:
                        # The scope holds one step, never a yield.
                        with trio.fail_after(attempts.remaining_s()):
                            entry = await anext(found)
                    except StopAsyncIteration:
                        return
                    except trio.TooSlowError as exc:
                        raise attempts.ended("list", prefix) from exc
                    except BlobStoreUnavailable as exc:
                        await self._pause(attempts, "list", prefix, exc)
                        break
                    last = entry.name
                    attempts = _Attempts(self._policy, self._jitter)
                    yield entry

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _repeat(self, method: Method, name: str, call: Callable[[], Awaitable[T]]) -> T:
        attempts = _Attempts(self._policy, self._jitter)
        rereads = 0
        while True:
            try:
                with trio.fail_after(attempts.remaining_s()):
                    return await call()
            except trio.TooSlowError as exc:
                raise attempts.ended(method, name) from exc
            except CorruptBlob as exc:
                if method != "read" or rereads == self._policy.corrupt_rereads_max:
                    log.error("corrupt data in the blob store: %s", exc)
                    raise
                rereads += 1
                log.warning("read again after corrupt data from the blob store: %s", exc)
                self._on_retry(method, exc)
            except BlobStoreUnavailable as exc:
                await self._pause(attempts, method, name, exc)

    async def _pause(self, attempts: _Attempts, method: Method, name: str, error: BlobStoreUnavailable) -> None:
        pause_s = attempts.next_pause_s(error)
        if pause_s is None or pause_s > _pause_max_s.get():
            raise error
        log.info("%s of %r failed, again in %.2f s: %s", method, name, pause_s, error)
        self._on_retry(method, error)
        await trio.sleep(pause_s)


class _Attempts:
    """The time and the errors of one call."""

    def __init__(self, policy: RetryPolicy, jitter: Callable[[], float]) -> None:
        self._policy = policy
        self._jitter = jitter
        self._deadline = trio.current_time() + policy.deadline_s
        self._backoff_s = policy.first_backoff_s
        self._last_error: BlobStoreError | None = None

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - trio.current_time())

    def next_pause_s(self, error: BlobStoreError) -> float | None:
        """Between half of the backoff and all of it, so that many clients spread; None if no time is left for it."""
        self._last_error = error
        pause_s = self._backoff_s * (0.5 + self._jitter() / 2)
        self._backoff_s = min(self._backoff_s * 2, self._policy.backoff_max_s)
        return pause_s if pause_s < self.remaining_s() else None

    def ended(self, method: Method, name: str) -> BlobStoreTimeout:
        cause = "" if self._last_error is None else f"; before that: {self._last_error}"
        return BlobStoreTimeout(f"{method} of {name!r} did not end within {self._policy.deadline_s:g} s{cause}")
