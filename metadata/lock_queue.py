"""The requests of this mount that wait for a lock, and their place in the queue of all mounts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

import trio

from apollofs.metadata.lock_picture import Waiting
from apollofs.metadata.lock_ranges import blockers
from apollofs.metadata.lock_records import Lock


@dataclass(eq=False)
class Waiter:
    """One request. `key` is its place in the store, `arrival` the revision that made it.

    `ready` is set when nothing blocks it any more as far as is known, when it should read the watch, or at the end.
    """

    key: bytes
    lock: Lock
    arrival: int = 0
    ready: trio.Event = field(default_factory=trio.Event)
    watching: trio.CancelScope | None = None
    """While it reads the watch."""

    def wake(self) -> None:
        self.ready.set()
        if self.watching is not None:
            self.watching.cancel()


def ahead_of(arrival: int | None, queue: Iterable[Waiting]) -> Iterator[Lock]:
    """The requests of a queue in order of arrival that came before `arrival` (None: all)."""
    if arrival is not None:
        queue = takewhile(lambda waiting: waiting.arrival < arrival, queue)
    return (waiting.lock for waiting in queue)


def blocked(waiter: Waiter, holders: Iterable[Lock], queue: Iterable[Waiting]) -> bool:
    """Whether it must wait, given all locks held and all requests in order of arrival."""
    return next(blockers(waiter.lock, holders, ahead_of(waiter.arrival, queue)), None) is not None
