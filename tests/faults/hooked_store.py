"""HookedStore: any Store with a hook around its requests, so that one set of faults runs on memory and on real etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import TypeVar

from apollofs.metadata.errors import StoreError
from apollofs.metadata.memory import Hook, Moment, Request
from apollofs.metadata.store import Compare, Lease, Op, Range, RangeResult, Store, TxnResult, WatchBatch

T = TypeVar("T")


async def no_hook(moment: Moment, request: Request) -> None:
    """Nothing happens."""


class Stopped(StoreError):
    """A process ends here."""


def stopping(step: int, moment: Moment, methods: Collection[str]) -> Hook:
    """A hook that raises Stopped at every request of these methods from number `step` on, counted from 0."""
    numbers = count()

    async def hook(when: Moment, request: Request) -> None:
        if when is moment and request.method in methods and next(numbers) >= step:
            raise Stopped("by the test")

    return hook


class HookedStore:
    """Calls `hook` before a request leaves and after its answer is here; what it raises is raised in their place.

    Closing it closes the store beneath. Watches pass unseen.
    """

    def __init__(self, store: Store, hook: Hook = no_hook) -> None:
        self._store = store
        self.hook = hook

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """See the port."""
        request = Request("txn", (tuple(compares), tuple(then), tuple(orelse)))
        return await self._call(request, lambda: self._store.txn(compares, then, orelse))

    async def range(self, request: Range) -> RangeResult:
        """See the port."""
        return await self._call(Request("range", (request,)), lambda: self._store.range(request))

    def watch(
        self, key: bytes, range_end: bytes = b"", *, start_revision: int, last_revision: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """See the port."""
        return self._store.watch(key, range_end, start_revision=start_revision, last_revision=last_revision)

    async def lease_grant(self, ttl_s: int) -> Lease:
        """See the port."""
        return await self._call(Request("lease_grant", (ttl_s,)), lambda: self._store.lease_grant(ttl_s))

    async def lease_keepalive(self, lease_id: int) -> int:
        """See the port."""
        return await self._call(Request("lease_keepalive", (lease_id,)), lambda: self._store.lease_keepalive(lease_id))

    async def lease_revoke(self, lease_id: int) -> None:
        """See the port."""
        await self._call(Request("lease_revoke", (lease_id,)), lambda: self._store.lease_revoke(lease_id))

    async def aclose(self) -> None:
        """See the port."""
        await self._store.aclose()

    async def _call(self, request: Request, call: Callable[[], Awaitable[T]]) -> T:
        await self.hook(Moment.BEFORE, request)
        result = await call()
        await self.hook(Moment.AFTER, request)
        return result
