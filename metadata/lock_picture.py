"""What the other sessions hold and wait for on one inode, as far as this mount has heard.

A picture is complete as of its revision. It may lag: a change made in the store compares that no key of the others has
been put since that revision. That one was deleted meanwhile disturbs nobody, and at worst makes one ask again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_records import Lock, LockKind, decode_held, decode_waiting
from apollofs.metadata.store import Compare, Event, KeyValue, Relation, Target, prefix_end

TICKET_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits; `arrival` is the revision that made its key, the order in which requests are served."""

    arrival: int
    lock: Lock


class Places:
    """The keys of the locks on one inode, as one session sees them."""

    def __init__(self, keys: Keys, ino: int, kind: LockKind, session: int) -> None:
        self._keys = keys
        self._ino = ino
        self._kind = kind
        self._session = session
        self.all = keys.locks_of(ino, kind)
        self.end = prefix_end(self.all)
        self.held = keys.locks(ino, kind, session)
        """This session's key."""
        self._first_ticket = self.waiter(0)
        self._past_tickets = self.waiter(TICKET_MAX) + b"\0"
        self._waiters = keys.lock_waiter(ino, kind, 0, 0)

    def waiter(self, ticket: int) -> bytes:
        return self._keys.lock_waiter(self._ino, self._kind, self._session, ticket)

    def is_own_waiter(self, key: bytes) -> bool:
        return self._first_ticket <= key < self._past_tickets

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
            stretches += [(self._waiters, self._first_ticket), (self._past_tickets, self.end)]
        return tuple(Compare(start, Target.MOD, Relation.LESS, revision + 1, end) for start, end in stretches)


class Picture:
    """See the module. A new one says that nobody else holds or wants anything, as of revision 0."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.revision = 0
        self._held: dict[bytes, tuple[Lock, ...]] = {}
        self._waiting: dict[bytes, Waiting] = {}

    @property
    def held(self) -> Iterator[Lock]:
        """All locks of other sessions."""
        return (lock for held in self._held.values() for lock in held)

    @property
    def waiting(self) -> Iterator[Waiting]:
        """All requests of other sessions that wait, in no order."""
        return iter(self._waiting.values())

    def replace(self, revision: int, kvs: Sequence[KeyValue]) -> None:
        """All keys were read as of `revision`. Raises CorruptRecord, UnsupportedFormat."""
        if revision < self.revision:
            return
        fresh = Picture(self._places)
        for kv in kvs:
            fresh._put(kv)  # a record that does not decode leaves this picture as it is
        self._held, self._waiting, self.revision = fresh._held, fresh._waiting, revision

    def apply(self, revision: int, events: Sequence[Event]) -> None:
        """Changes up to `revision`; those known already are passed over. Raises CorruptRecord, UnsupportedFormat."""
        for event in events:
            if event.kv.mod_revision <= self.revision:
                continue
            if event.deleted:
                self._held.pop(event.kv.key, None)
                self._waiting.pop(event.kv.key, None)
            else:
                self._put(event.kv)
        self.revision = max(self.revision, revision)

    def _put(self, kv: KeyValue) -> None:
        if not self._places.is_others(kv.key):
            return
        if self._places.is_waiter(kv.key):
            self._waiting[kv.key] = Waiting(kv.create_revision, decode_waiting(kv.value))
        else:
            self._held[kv.key] = decode_held(kv.value)


def all_held(places: Places, kvs: Sequence[KeyValue]) -> Iterator[Lock]:
    """The locks of every session, this one's too, among keys just read. Raises CorruptRecord, UnsupportedFormat."""
    return (lock for kv in kvs if not places.is_waiter(kv.key) for lock in decode_held(kv.value))
