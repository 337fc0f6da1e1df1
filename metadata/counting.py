"""CountingStore: a Store that wraps a Store and counts what it is asked, for metrics and for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from apollofs.metadata.store import Compare, Lease, Op, Range, RangeResult, Store, TxnResult, WatchBatch


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests since the last reset, also those that failed.

    `compares` and `ops` are those of all transactions; an op of the branch that did not run counts too.
    """

    txn: int = 0
    range: int = 0
    watch: int = 0
    lease_grant: int = 0
    lease_keepalive: int = 0
    lease_revoke: int = 0
    compares: int = 0
    ops: int = 0

    @property
    def requests(self) -> int:
        """Transactions and reads: what operations on files cost. Watches and leases serve the whole mount."""
        return self.txn + self.range


class CountingStore:
    """See the module. Closing it closes the store beneath."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counts: Counter[str] = Counter()

    def snapshot(self) -> Counts:
        """The counts as of now."""
        return Counts(**self._counts)

    @property
    def requests(self) -> int:
        """Transactions and reads since the last reset."""
        return self.snapshot().requests

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        counts = self.snapshot()
        return {
            "requests": counts.requests,
            "transactions": counts.txn,
            "reads": counts.range,
            "watches": counts.watch,
            "keepalives": counts.lease_keepalive,
        }

    def reset(self) -> None:
        """Count from zero again."""
        self._counts.clear()

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """See the port."""
        self._counts["txn"] += 1
        self._counts["compares"] += len(compares)
        self._counts["ops"] += len(then) + len(orelse)
        return await self._store.txn(compares, then, orelse)

    async def range(self, request: Range) -> RangeResult:
        """See the port."""
        self._counts["range"] += 1
        return await self._store.range(request)

    def watch(
        self, key: bytes, range_end: bytes = b"", *, start_revision: int, last_revision: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """See the port."""
        self._counts["watch"] += 1
        return self._store.watch(key, range_end, start_revision=start_revision, last_revision=last_revision)

    async def lease_grant(self, ttl_s: int) -> Lease:
        """See the port."""
        self._counts["lease_grant"] += 1
        return await self._store.lease_grant(ttl_s)

    async def lease_keepalive(self, lease_id: int) -> int:
        """See the port."""
        self._counts["lease_keepalive"] += 1
        return await self._store.lease_keepalive(lease_id)

    async def lease_revoke(self, lease_id: int) -> None:
        """See the port."""
        self._counts["lease_revoke"] += 1
        await self._store.lease_revoke(lease_id)

    async def aclose(self) -> None:
        """See the port."""
        await self._store.aclose()
