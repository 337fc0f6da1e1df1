"""What a memory store holds: keys with their history, leases, and the rules of etcd's transactions.

Plain calls without `await`, so each is atomic among trio tasks. `memory.py` makes a Store of it.

The history of every key is kept until `compact`, as in etcd: a read may name an older revision, and a watch may start
at one. Revision 1 is the empty store.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apollofs.metadata.errors import Compacted, LeaseNotFound, RequestTooLarge, StoreMisuse
from apollofs.metadata.store import (
    OPS_MAX,
    REQUEST_BYTES_MAX,
    Compare,
    Delete,
    Event,
    KeyValue,
    Lease,
    Op,
    Put,
    Range,
    RangeResult,
    Relation,
    Target,
    TxnResult,
)

NO_END = b"\0"
"""As `range_end`: up to the last key (etcd's rule)."""
ABSENT = KeyValue(b"", b"", 0, 0, 0)
OP_OVERHEAD_BYTES = 16

_RELATIONS: dict[Relation, Callable[[Any, Any], bool]] = {
    Relation.EQUAL: operator.eq,
    Relation.GREATER: operator.gt,
    Relation.LESS: operator.lt,
    Relation.NOT_EQUAL: operator.ne,
}


@dataclass(slots=True)
class _LeaseRecord:
    ttl_s: int
    ends_at: float
    keys: set[bytes] = field(default_factory=set)


class MemoryData:
    """The state that all handles of one memory store share. `clock` gives seconds; leases end by it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.revision = 1
        self.compacted = 0
        """States before this revision are gone (0: nothing was ever compacted)."""
        self._now: dict[bytes, KeyValue] = {}
        self._now_keys: list[bytes] = []
        self._past: dict[bytes, list[Event]] = {}
        self._past_keys: list[bytes] = []
        self._log: list[Event] = []
        self._leases: dict[int, _LeaseRecord] = {}
        self._lease_number = 0

    # -- reads -------------------------------------------------------------------------------------------------------

    def range(self, request: Range) -> RangeResult:
        """Raises Compacted for a state that is gone, StoreMisuse for one that has not come."""
        _check_key(request.key)
        if request.revision and request.revision < self.compacted:
            raise Compacted("required revision has been compacted", self.compacted)
        if request.revision > self.revision:
            raise StoreMisuse(f"revision {request.revision} is in the future")
        if request.revision:
            found = [
                kv for key in self._matching(self._past_keys, request) if (kv := self._as_of(key, request.revision))
            ]
        else:
            found = [self._now[key] for key in self._matching(self._now_keys, request)]
        count = len(found)
        if request.count_only:
            return RangeResult((), False, count, self.revision)
        more = 0 < request.limit < count
        kvs = found[: request.limit] if more else found
        if request.keys_only:
            kvs = [kv._replace(value=b"") for kv in kvs]
        return RangeResult(tuple(kvs), more, count, self.revision)

    def events(self, key: bytes, range_end: bytes, first: int, revisions_max: int) -> tuple[int, tuple[Event, ...]]:
        """Events of the range from revision `first` on, and the revision up to which they are complete.

        Looks at `revisions_max` revisions at most. Raises Compacted if some of them may be gone.
        """
        self.check_history(first)
        last = min(self.revision, first + revisions_max - 1)
        start = bisect_left(self._log, first, key=_mod_revision)
        end = bisect_right(self._log, last, key=_mod_revision)
        return last, tuple(event for event in self._log[start:end] if _inside(event.kv.key, key, range_end))

    def check_history(self, first: int) -> None:
        """Raises Compacted if changes from revision `first` on may be gone."""
        if first <= self.compacted:
            raise Compacted("required revision has been compacted", self.compacted + 1)

    def _matching(self, keys: list[bytes], what: Range | Delete | Compare) -> list[bytes]:
        """Those of the sorted `keys` that lie in the range."""
        start = bisect_left(keys, what.key)
        if not what.range_end:
            return keys[start : start + 1] if keys[start : start + 1] == [what.key] else []
        end = len(keys) if what.range_end == NO_END else bisect_left(keys, what.range_end)
        return keys[start:end]

    def _as_of(self, key: bytes, revision: int) -> KeyValue | None:
        events = self._past[key]
        index = bisect_right(events, revision, key=_mod_revision) - 1
        return None if index < 0 or events[index].deleted else events[index].kv

    # -- transactions ------------------------------------------------------------------------------------------------

    def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op]) -> TxnResult:
        """All of a branch or nothing. Raises RequestTooLarge, StoreMisuse, LeaseNotFound."""
        _check_request(compares, then, orelse)
        succeeded = all(self._holds(compare) for compare in compares)
        branch = then if succeeded else orelse
        for op in branch:
            if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                raise LeaseNotFound("requested lease not found")
        revision = self.revision + 1
        found: list[RangeResult | None] = []
        changed = False
        for op in branch:
            if isinstance(op, Range):
                found.append(self.range(op))
                continue
            found.append(None)
            if isinstance(op, Put):
                self._put(op, revision)
                changed = True
            else:
                changed = self._delete(self._matching(self._now_keys, op), revision) or changed
        if changed:
            self.revision = revision
        return TxnResult(
            succeeded, self.revision, tuple(each and replace(each, revision=self.revision) for each in found)
        )

    def _holds(self, compare: Compare) -> bool:
        found = [self._now[key] for key in self._matching(self._now_keys, compare)]
        if not found and compare.target is Target.VALUE:
            return False
        holds = _RELATIONS[compare.relation]
        return all(holds(_property(kv, compare.target), compare.operand) for kv in found or [ABSENT])

    def _put(self, op: Put, revision: int) -> None:
        old = self._now.get(op.key)
        if old is None:
            insort(self._now_keys, op.key)
            kv = KeyValue(op.key, op.value, revision, revision, 1, op.lease)
        else:
            kv = KeyValue(op.key, op.value, old.create_revision, revision, old.version + 1, op.lease)
            if old.lease:
                self._leases[old.lease].keys.discard(op.key)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
        self._now[op.key] = kv
        self._remember(Event(False, kv))

    def _delete(self, keys: Sequence[bytes], revision: int) -> bool:
        for key in keys:
            old = self._now.pop(key)
            del self._now_keys[bisect_left(self._now_keys, key)]
            if old.lease:
                self._leases[old.lease].keys.discard(key)
            self._remember(Event(True, KeyValue(key, b"", 0, revision, 0)))
        return bool(keys)

    def _remember(self, event: Event) -> None:
        key = event.kv.key
        if key not in self._past:
            insort(self._past_keys, key)
            self._past[key] = []
        self._past[key].append(event)
        self._log.append(event)

    def compact(self, revision: int) -> None:
        """Forget what only states before `revision` need. Raises Compacted or StoreMisuse as etcd does."""
        if revision <= self.compacted:
            raise Compacted("required revision has been compacted", self.compacted)
        if revision > self.revision:
            raise StoreMisuse(f"revision {revision} is in the future")
        self.compacted = revision
        del self._log[: bisect_right(self._log, revision, key=_mod_revision)]
        for key in list(self._past_keys):
            events = self._past[key]
            kept = bisect_right(events, revision, key=_mod_revision)
            if kept and not events[kept - 1].deleted:
                kept -= 1  # still the state as of `revision`
            del events[:kept]
            if not events:
                del self._past[key]
                del self._past_keys[bisect_left(self._past_keys, key)]

    # -- leases ------------------------------------------------------------------------------------------------------

    def grant(self, ttl_s: int) -> Lease:
        if ttl_s <= 0:
            raise StoreMisuse("a lease needs a time to live")
        self._lease_number += 1
        self._leases[self._lease_number] = _LeaseRecord(ttl_s, self._clock() + ttl_s)
        return Lease(self._lease_number, ttl_s)

    def keep_alive(self, lease_id: int) -> int:
        """The new time to live, 0 if the lease has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0
        lease.ends_at = self._clock() + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int) -> bool:
        """End a lease; its keys go in one revision. True if any key went."""
        lease = self._leases.pop(lease_id, None)
        if lease is None or not lease.keys:
            return False
        revision = self.revision + 1
        for key in lease.keys:
            self._now[key] = self._now[key]._replace(lease=0)
        self._delete(sorted(lease.keys), revision)
        self.revision = revision
        return True

    def expire(self) -> bool:
        """End the leases whose time is over. True if any key went."""
        now = self._clock()
        ended = [number for number, lease in self._leases.items() if lease.ends_at <= now]
        return sum(map(self.revoke, ended)) > 0

    def next_expiry_s(self) -> float:
        """Seconds until the next lease ends; infinity if there is none."""
        return min((lease.ends_at for lease in self._leases.values()), default=float("inf")) - self._clock()


def _mod_revision(event: Event) -> int:
    return event.kv.mod_revision


def _inside(key: bytes, start: bytes, range_end: bytes) -> bool:
    if not range_end:
        return key == start
    return start <= key and (range_end == NO_END or key < range_end)


def _property(kv: KeyValue, target: Target) -> int | bytes:
    match target:
        case Target.VERSION:
            return kv.version
        case Target.CREATE:
            return kv.create_revision
        case Target.MOD:
            return kv.mod_revision
        case Target.VALUE:
            return kv.value
        case Target.LEASE:
            return kv.lease


def _check_key(key: bytes) -> None:
    if not key:
        raise StoreMisuse("key is not provided")


def _check_request(compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op]) -> None:
    """The limits and rules that etcd checks before it applies anything; both branches count."""
    if max(len(compares), len(then), len(orelse)) > OPS_MAX:
        raise RequestTooLarge("too many operations in txn request")
    size = 0
    for part in (*compares, *then, *orelse):
        _check_key(part.key)
        size += OP_OVERHEAD_BYTES + len(part.key)
        if isinstance(part, Put):
            size += len(part.value)
        else:
            size += len(part.range_end)
        if isinstance(part, Compare) and isinstance(part.operand, bytes):
            size += len(part.operand)
        if isinstance(part, Range) and part.revision:
            raise StoreMisuse("a read inside a transaction can't name a revision")
    if size > REQUEST_BYTES_MAX:
        raise RequestTooLarge(f"request of about {size} bytes is too large")
    for branch in (then, orelse):
        _check_writes(branch)


def _check_writes(branch: Sequence[Op]) -> None:
    """No key is put twice, or put and deleted, in one branch."""
    puts = [op.key for op in branch if isinstance(op, Put)]
    deletes = [op for op in branch if isinstance(op, Delete)]
    if len(set(puts)) < len(puts) or any(_inside(key, op.key, op.range_end) for op in deletes for key in puts):
        raise StoreMisuse("duplicate key given in txn request")
