"""What the other sessions hold and wait for on one inode, as far as this mount has heard.

A picture is complete as of its revision. It may lag: a change made in the store compares that no key of the others has
been put since that revision. That one was deleted meanwhile is compared only where somebody was passed over because of
it (`lock_queue.passed_over`); elsewhere it at worst makes one ask again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_records import (
    RANGE_END,
    Arrival,
    Holding,
    Lock,
    LockKind,
    LockType,
    decode_held,
    decode_waiting,
)
from apollofs.metadata.store import Compare, Event, KeyValue, Relation, Target, prefix_end

TICKET_MAX = (1 << 64) - 1
SOLE_OWNER = -1
"""The owner of the lock that stands for all that a session which decides alone may have granted."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request. `key` is empty if it is not in the store."""

    arrival: Arrival
    lock: Lock
    key: bytes = b""


class Keeper(NamedTuple):
    """Another session that decides alone: its number, its key, and the revision that made it so."""

    session: int
    key: bytes
    revision: int


class Places:
    """The keys of the locks on one inode, as one session sees them."""

    def __init__(self, keys: Keys, ino: int, kind: LockKind, session: int) -> None:
        self._keys = keys
        self.ino = ino
        self._kind = kind
        self._session = session
        self.all = keys.locks_of(ino, kind)
        self.end = prefix_end(self.all)
        self.held = keys.locks(ino, kind, session)
        """This session's key."""
        self.first_ticket = self.waiter(0)
        self.past_tickets = self.waiter(TICKET_MAX) + b"\0"
        self._waiters = keys.lock_waiter(ino, kind, 0, 0)

    def waiter(self, ticket: int) -> bytes:
        return self._keys.lock_waiter(self.ino, self._kind, self._session, ticket)

    def recall(self, session: int) -> bytes:
        """A notice to the session that decides alone."""
        return self._keys.lock_recall(session, self.ino, self._kind)

    def is_own_waiter(self, key: bytes) -> bool:
        return self.first_ticket <= key < self.past_tickets

    def is_others(self, key: bytes) -> bool:
        return key != self.held and not self.is_own_waiter(key)

    def is_waiter(self, key: bytes) -> bool:
        return key >= self._waiters  # `w` comes after `h`

    def others_unchanged_since(self, revision: int, *, queued: bool) -> tuple[Compare, ...]:
        """True while no other session has put a key after `revision` that is still there (0: has none at all).

        `queued`: for a request with a place in the queue, which doesn't care who comes to stand behind it.
        """
        stretches = [(self.all, self.held), (self.held + b"\0", self._waiters)]
        if not queued:
            stretches += [(self._waiters, self.first_ticket), (self.past_tickets, self.end)]
        return tuple(Compare(start, Target.MOD, Relation.LESS, revision + 1, end) for start, end in stretches)


class Picture:
    """See the module. A new one says that nobody else holds or wants anything, as of revision 0."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.revision = 0
        self._held: dict[bytes, Holding] = {}
        self._waiting: dict[bytes, Waiting] = {}
        self.keeper: Keeper | None = None
        """Who decides alone."""

    @property
    def held(self) -> Iterator[Lock]:
        """All locks in the keys of other sessions; for one that decides alone, one that excludes everybody else."""
        for holding in self._held.values():
            if holding.sole:
                yield Lock(holding.session, SOLE_OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 0)
            yield from holding.locks

    @property
    def alone(self) -> bool:
        """Nobody else holds or wants anything."""
        return not self._waiting and next(self.held, None) is None

    @property
    def waiting(self) -> Iterator[Waiting]:
        """All requests of other sessions, in no order."""
        return iter(self._waiting.values())

    def replace(self, revision: int, kvs: Sequence[KeyValue]) -> None:
        """All keys were read as of `revision`. Raises CorruptRecord, UnsupportedFormat."""
        if revision < self.revision:
            return
        fresh = Picture(self._places)
        for kv in kvs:
            fresh._put(kv)  # a record that does not decode leaves this picture as it is
        self._held, self._waiting, self.keeper = fresh._held, fresh._waiting, fresh.keeper
        self.revision = revision

    def apply(self, revision: int, events: Sequence[Event]) -> None:
        """Changes up to `revision`; those known already are passed over. Raises CorruptRecord, UnsupportedFormat."""
        for event in events:
            if event.kv.mod_revision <= self.revision:
                continue
            if event.deleted:
                self._drop(event.kv.key)
            else:
                self._put(event.kv)
        self.revision = max(self.revision, revision)

    def _drop(self, key: bytes) -> None:
        self._held.pop(key, None)
        self._waiting.pop(key, None)
        if self.keeper is not None and self.keeper.key == key:
            self.keeper = None

    def _put(self, kv: KeyValue) -> None:
        if not self._places.is_others(kv.key):
            return
        if self._places.is_waiter(kv.key):
            lock, arrival = decode_waiting(kv.value)
            self._waiting[kv.key] = Waiting(arrival or Arrival(kv.create_revision), lock, kv.key)
            return
        holding = decode_held(kv.value)
        self._drop(kv.key)
        self._held[kv.key] = holding
        if holding.sole:
            self.keeper = Keeper(holding.session, kv.key, kv.mod_revision)
