"""Requests for a lock, and their place in the queue of all mounts.

Position is possession: a request that nothing held and nothing before it in the queue conflicts with has the lock; its
key is the record of that, until the session's own key says it too. It stays so, whatever others do: who comes later
waits behind it, and nobody is granted anything by passing it over, because only requests that wait are passed over,
and whoever does so compares that they still do (`passed_over`). Only one that would weaken what its owner holds is not
left at that: others wait for the session's key to say so (`lock_ranges.weakens`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

import trio

from apollofs.metadata.lock_picture import Waiting
from apollofs.metadata.lock_ranges import blockers, conflict, same_owner
from apollofs.metadata.lock_records import Arrival, Lock


@dataclass(eq=False)
class Waiter:
    """One request of this mount that waits.

    `key` is its place in the store; `placed`: it is there. `ready` is set when nothing blocks it any more as far as is
    known, when it should read the watch, or at the end.
    """

    key: bytes
    lock: Lock
    arrival: Arrival
    placed: bool
    ready: trio.Event = field(default_factory=trio.Event)
    watching: trio.CancelScope | None = None
    """While it reads the watch."""
    sleeps: bool = False
    """It has found that it must wait, and closes no circle."""

    def wake(self) -> None:
        self.ready.set()
        if self.watching is not None:
            self.watching.cancel()

    @property
    def place(self) -> Waiting:
        return Waiting(self.arrival, self.lock, self.key if self.placed else b"")


def ahead_of(arrival: Arrival | None, queue: Iterable[Waiting]) -> Iterator[Waiting]:
    """The requests of a queue in order of arrival that came before `arrival` (None: all)."""
    if arrival is not None:
        return takewhile(lambda waiting: waiting.arrival < arrival, queue)
    return iter(queue)


def blocked(waiter: Waiter, holders: Iterable[Lock], queue: Iterable[Waiting]) -> bool:
    """Whether it must wait, given all locks held and all requests in order of arrival."""
    ahead = (waiting.lock for waiting in ahead_of(waiter.arrival, queue))
    return next(blockers(waiter.lock, holders, ahead), None) is not None


def has_lock(request: Waiting, holders: Iterable[Lock], queue: Iterable[Waiting]) -> bool:
    """Whether a request of the queue has its lock by its position, and for good."""
    if any(conflict(request.lock, lock) for lock in holders):
        return False
    return not any(conflict(request.lock, other.lock) for other in ahead_of(request.arrival, queue))


def passed_over(wanted: Lock, held: Iterable[Lock], ahead: Iterable[Waiting]) -> list[bytes]:
    """The keys of the requests whose waiting lets `wanted` pass others: each must still be there when it is granted.

    `held` are locks, `ahead` the requests that came before. A request that conflicts with what the owner of `wanted`
    holds has no lock whatever happens; one that only waits behind such a request would have it if that one went.
    """
    own = [lock for lock in held if same_owner(wanted, lock)]
    chain: list[Waiting] = []
    needed: dict[bytes, None] = {}
    for request in ahead:
        direct = any(conflict(request.lock, lock) for lock in own)
        behind = next((other for other in chain if conflict(request.lock, other.lock)), None)
        if not direct and behind is None:
            continue
        chain.append(request)
        if not direct and behind is not None:
            needed[behind.key] = None
    return [key for key in needed if key]
