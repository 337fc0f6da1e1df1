"""The Store port: what the metadata layer asks of an ordered, transactional key-value store.

Two adapters implement it and pass one contract suite (`tests/contract/test_store.py`): `etcd.py` (the product) and
`memory.py` (unit tests). The semantics are etcd's v3 API: linearizable transactions, one revision a transaction,
ranges over byte order, watches in revision order without gaps, leases that delete their keys when they end.

Rules that every adapter keeps:
- A call ends in one of three ways: a result; an error of `errors.StoreError` that is *not* `OutcomeUnknown`, which
  promises that the request changed nothing; or `OutcomeUnknown`, when the request may or may not have been applied.
- An adapter never repeats a transaction whose outcome it doesn't know: only the caller knows whether that is safe.
  Reads (`range`, and `txn` without any write) it may repeat itself.
- Every call is a trio checkpoint, may be cancelled, and ends within the adapter's deadline.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

OPS_MAX = 128
"""Operations in one branch of a transaction, and compares in one transaction (etcd's --max-txn-ops)."""

NOW = 0
"""Where a watch starts that needs no history."""

REQUEST_BYTES_MAX = 1_500_000
"""Size of one request (etcd's --max-request-bytes is 1.5 MiB)."""


class KeyValue(NamedTuple):
    """One key as of the revision at which it was read."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Target(enum.IntEnum):
    """The property of a key that a compare looks at (numbers are those of etcd's API)."""

    VERSION = 0
    CREATE = 1
    MOD = 2
    VALUE = 3
    LEASE = 4


class Relation(enum.IntEnum):
    """How the property must relate to the operand (numbers are those of etcd's API)."""

    EQUAL = 0
    GREATER = 1
    LESS = 2
    NOT_EQUAL = 3


class Compare(NamedTuple):
    """A condition of a transaction. With `range_end` it must hold for every key in `[key, range_end)`.

    An absent key, and an empty range, have version, create and mod revision 0; a VALUE compare on them is false.
    """

    key: bytes
    target: Target
    relation: Relation
    operand: int | bytes
    range_end: bytes = b""


class Put(NamedTuple):
    """Write one key. `lease` 0: it stays until deleted."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete one key, or every key in `[key, range_end)`. Deleting what is absent is no error."""

    key: bytes
    range_end: bytes = b""


class Range(NamedTuple):
    """Read one key, or up to `limit` keys (0: all) of `[key, range_end)` in key order.

    `count_only` returns no keys, only `RangeResult.count`. `revision` 0 reads the newest state; an older one reads
    the state as of it, or fails with `Compacted`. Inside a transaction `revision` must be 0.
    """

    key: bytes
    range_end: bytes = b""
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    count_only: bool = False


@dataclass(frozen=True, slots=True)
class RangeResult:
    """The keys read, whether more match than `limit` let through, and how many match in all."""

    kvs: tuple[KeyValue, ...]
    more: bool
    count: int
    revision: int
    """The store's revision when it answered."""


Op: TypeAlias = Put | Delete | Range


class TxnResult(NamedTuple):
    """`ranges` has one entry for each op of the branch that ran: a RangeResult for a Range, None for a write."""

    succeeded: bool
    revision: int
    ranges: tuple[RangeResult | None, ...]


class Event(NamedTuple):
    """One change of one key. For a deletion `kv.value` is empty and `kv.mod_revision` the revision that deleted it."""

    deleted: bool
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Events in revision order, complete up to and including `revision`. Progress reports have no events."""

    revision: int
    events: tuple[Event, ...]

    def until(self, last: int) -> WatchBatch:
        """What of it a watch tells that ends at a revision (0: it does not end)."""
        if not 0 < last < self.revision:
            return self
        return WatchBatch(last, tuple(event for event in self.events if event.kv.mod_revision <= last))


@dataclass(frozen=True, slots=True)
class Lease:
    id: int
    ttl_s: int


class Store(Protocol):
    """See the module's docstring for the rules. All methods raise `errors.StoreError` and its leaves."""

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """Run `then` if every compare holds, else `orelse`; atomic, linearizable.

        Raises `RequestTooLarge` past etcd's limits (nothing applied), `OutcomeUnknown` if it may have been applied.
        """
        ...

    async def range(self, request: Range) -> RangeResult:
        """Linearizable read."""
        ...

    def watch(
        self, key: bytes, range_end: bytes = b"", *, start_revision: int, last_revision: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """Every change of the key or range from `start_revision` on, in order, none missing and none twice.

        `start_revision` NOW: from some moment after the call on; the first batch has no events, and its `revision` is
        that before the first that will be told. Who has read what is there after that batch has missed nothing, and
        hears at once, whereas a watch that starts in the past may be told of its first changes later (etcd 3.5: by up
        to 100 ms).

        With `last_revision` the iterator ends when all up to that has been told, and its last batch ends there; the
        server is asked for nothing that is later. It takes an event at or after it to know: where none may come, see
        that there is one.

        Reconnects by itself and goes on where it was. Raises `Compacted` from the iterator when history that is
        still owed has been compacted.
        """
        ...

    async def lease_grant(self, ttl_s: int) -> Lease: ...

    async def lease_keepalive(self, lease_id: int) -> int:
        """Renew; return the new time to live in seconds, or 0 if the lease has ended."""
        ...

    async def lease_revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys. Revoking an ended lease is no error."""
        ...

    async def aclose(self) -> None: ...


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key that is greater than every key with this prefix (`b""`-terminated ranges never occur here)."""
    assert prefix and prefix.rstrip(b"\xff"), "a prefix of only 0xff bytes has no end"
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1])
