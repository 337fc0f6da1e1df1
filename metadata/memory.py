"""MemoryStore: the Store port in this process's memory, for tests and for several mounts of one process.

It keeps etcd's rules (`memory_data.py`) and passes the suite that the etcd adapter passes. A handle can be given a
hook, which sees every request before and after it is applied and may raise in its place: that is how a test loses a
reply or makes the store unreachable for one mount.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import trio

from apollofs.metadata.errors import StoreMisuse, StoreUnavailable
from apollofs.metadata.memory_data import MemoryData
from apollofs.metadata.store import NOW, Compare, Lease, Op, Range, RangeResult, TxnResult, WatchBatch

T = TypeVar("T")
WATCH_REVISIONS_MAX = 1000
"""Revisions in one batch of a watch."""
EXPIRY_POLL_S = 0.01
"""The least time that a watch sleeps for a lease, so that a clock which stands still costs little."""


class Moment(enum.Enum):
    """When a hook is called: an error raised BEFORE means not applied; one raised AFTER, that the reply was lost."""

    BEFORE = enum.auto()
    AFTER = enum.auto()


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a hook sees it: the name of the port's method, and its arguments."""

    method: str
    arguments: tuple[object, ...]


Hook: TypeAlias = Callable[[Moment, Request], Awaitable[None]]


class _Shared:
    """The data of one store and the event that wakes its watches."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.data = MemoryData(clock)
        self._changed = trio.Event()

    @property
    def changed(self) -> trio.Event:
        return self._changed

    def announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class MemoryStore:
    """A Store. Handles made by `another` share the data.

    `clock` gives seconds (trio's clock unless told otherwise); leases end by it. After moving a clock of your own, any
    request, or `expire_leases`, ends what is due.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = trio.current_time,
        hook: Hook | None = None,
        _shared: _Shared | None = None,
    ) -> None:
        self.shared = _shared or _Shared(clock)
        """The data, for the handles and watches of this store alone."""
        self.hook = hook
        self._closed = False

    def another(self, hook: Hook | None = None) -> MemoryStore:
        """One more handle on the same data, as a second mount would have."""
        return MemoryStore(hook=hook, _shared=self.shared)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """See the port."""
        return await self._request("txn", lambda data: data.txn(compares, then, orelse), compares, then, orelse)

    async def range(self, request: Range) -> RangeResult:
        """See the port."""
        return await self._request("range", lambda data: data.range(request), request)

    @asynccontextmanager
    async def watch(
        self, key: bytes, range_end: bytes = b"", *, start_revision: int, last_revision: int = 0
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        """See the port. Nothing is queued: the iterator reads the history when it is asked."""
        if not key or start_revision < NOW:
            raise StoreMisuse("a watch needs a key and a revision to start from")
        await self._request("watch", lambda _: None, key, range_end, start_revision)
        yield _Watch(self, key, range_end, start_revision, last_revision)

    async def lease_grant(self, ttl_s: int) -> Lease:
        """See the port."""
        return await self._request("lease_grant", lambda data: data.grant(ttl_s), ttl_s)

    async def lease_keepalive(self, lease_id: int) -> int:
        """See the port."""
        return await self._request("lease_keepalive", lambda data: data.keep_alive(lease_id), lease_id)

    async def lease_revoke(self, lease_id: int) -> None:
        """See the port."""
        await self._request("lease_revoke", lambda data: data.revoke(lease_id), lease_id)

    async def compact(self, revision: int) -> None:
        """Forget states before `revision`. Raises Compacted if they are forgotten, StoreMisuse past the newest."""
        await self._request("compact", lambda data: data.compact(revision), revision)

    async def aclose(self) -> None:
        """Close this handle; the data stay."""
        self._closed = True
        self.shared.announce()
        await trio.lowlevel.checkpoint()

    def expire_leases(self) -> None:
        """End the leases whose time is over by the clock; for clocks that a test moves."""
        if self.shared.data.expire():
            self.shared.announce()

    async def _request(self, method: str, apply: Callable[[MemoryData], T], *arguments: object) -> T:
        await trio.lowlevel.checkpoint()
        request = Request(method, arguments)
        if self.hook is not None:
            await self.hook(Moment.BEFORE, request)
        self.check_open()
        self.expire_leases()
        data = self.shared.data
        before = data.revision, data.compacted
        result = apply(data)
        if (data.revision, data.compacted) != before:
            self.shared.announce()
        if self.hook is not None:
            await self.hook(Moment.AFTER, request)
        return result

    def check_open(self) -> None:
        """Raises StoreUnavailable once this handle is closed."""
        if self._closed:
            raise StoreUnavailable("the store has been closed")


class _Watch:
    """The batches of one watch. Whoever is cancelled while waiting for one may ask again."""

    def __init__(self, store: MemoryStore, key: bytes, range_end: bytes, first: int, last: int) -> None:
        self._store = store
        self._key = key
        self._range_end = range_end
        self._first = first
        self._last = last

    def __aiter__(self) -> AsyncIterator[WatchBatch]:
        return self

    async def __anext__(self) -> WatchBatch:
        await trio.lowlevel.checkpoint()
        data = self._store.shared.data
        while True:
            self._store.expire_leases()
            self._store.check_open()
            if self._first == NOW:
                self._first = data.revision + 1
                return WatchBatch(data.revision, ())
            if self._last and self._first > self._last:
                raise StopAsyncIteration
            if self._first <= data.revision:
                last, events = data.events(self._key, self._range_end, self._first, WATCH_REVISIONS_MAX)
                self._first = last + 1
                if events:
                    return WatchBatch(last, events).until(self._last)
            else:
                data.check_history(self._first)
                with trio.move_on_after(max(EXPIRY_POLL_S, data.next_expiry_s())):
                    await self._store.shared.changed.wait()
