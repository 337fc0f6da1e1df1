"""What walks of a tree may have seen, by the order of completed operations.

One process changes names, one operation after the other; others list directories meanwhile. A listing that began after
an operation had returned must show what that one did; one that overlaps an operation may show either.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Place = tuple[str, str]
"""A directory's name in the tree, and a name in it."""


@dataclass(frozen=True, slots=True)
class Event:
    """An operation made (`present`) or took away a name; times are those of the monotonic clock."""

    place: Place
    present: bool
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory as it was seen, by how it differs from how it was filled at the start."""

    directory: str
    began: float
    ended: float
    extra: frozenset[str]
    missing: frozenset[str]


@dataclass(frozen=True, slots=True)
class Glance:
    """A name that was listed and could not be found a moment later."""

    place: Place
    began: float
    ended: float


@dataclass
class History:
    """All events, each name's in order. `base`: what each directory was filled with."""

    base: frozenset[str]
    _events: defaultdict[Place, list[Event]] = field(default_factory=lambda: defaultdict(list))
    _names: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self._events[event.place].append(event)
            self._names[event.place[0]].add(event.place[1])

    def took_ms(self) -> list[float]:
        """How long each operation took; a rename is there twice."""
        return [(event.ended - event.began) * 1000 for events in self._events.values() for event in events]

    def allows(self, place: Place, present: bool, began: float, ended: float) -> bool:
        """Whether a name may have been seen so by who looked between `began` and `ended`."""
        events = self._events.get(place, [])
        over = bisect.bisect_right(events, began, key=lambda event: event.ended)
        before = events[over - 1].present if over else place[1] in self.base
        return before == present or any(event.present == present for event in events[over:] if event.began <= ended)

    def stale(self, seen: Iterable[Listing | Glance]) -> Iterator[str]:
        """A line for everything that was seen and can't have been so."""
        for one in seen:
            if isinstance(one, Glance):
                if not self.allows(one.place, False, one.began, one.ended):
                    yield f"{'/'.join(one.place)} was not found"
                continue
            for name in self._names[one.directory] | one.extra | one.missing:
                present = name in one.extra or (name in self.base and name not in one.missing)
                if not self.allows((one.directory, name), present, one.began, one.ended):
                    yield f"{one.directory}/{name} was {'listed' if present else 'not listed'}"
