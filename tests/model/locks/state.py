"""What there is in the model of locks: immutable, hashable, small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from apollofs.metadata.lock_records import Arrival, Lock

OWN = -1
"""The ticket of a session's own key."""


class Entry(NamedTuple):
    """A key of the store. A session's own one says `locks`, or that it decides `alone`; a request's its one lock."""

    mount: int
    ticket: int
    modified: int
    locks: tuple[Lock, ...]
    alone: bool = False
    arrival: Arrival = Arrival(0)

    @property
    def key(self) -> bytes:
        return b"%d/%d" % (self.mount, self.ticket)


class Call(NamedTuple):
    """One call of an owner. `lock` None: unlock everything. `may_leave`: it may be interrupted while it waits."""

    lock: Lock | None
    may_leave: bool = False


class Request(NamedTuple):
    """A call that waits."""

    owner: int
    ticket: int
    lock: Lock
    arrival: Arrival
    placed: bool


class Transaction(NamedTuple):
    """On its way. `what`: grant, alone, turn, enqueue, tell, mend, notice, release. `since`: nobody else may have put a
    key later; `present`: requests that must still be there."""

    what: str
    owner: int
    after: tuple[Lock, ...]
    since: int = -1
    queued: bool = False
    present: frozenset[bytes] = frozenset()
    keeper: Entry | None = None


class Mount(NamedTuple):
    picture: frozenset[Entry] = frozenset()
    seen: int = 0
    held: tuple[Lock, ...] = ()
    alone: bool = False
    paused: bool = False
    in_turn: bool = False
    """It decides alone, and will tell unasked."""
    passes_on: bool = False
    """What it holds was told: the end of that begins no turn."""
    requests: tuple[Request, ...] = ()
    by_place: frozenset[int] = frozenset()
    strays: frozenset[int] = frozenset()
    sent: Transaction | None = None
    at: tuple[int, ...] = ()
    """How many calls each owner has made."""
    tickets: int = 0
    told: int = -1
    """The mount that got a notice from here, which holds as long as it decides alone."""


class State(NamedTuple):
    revision: int
    past: tuple[tuple[int, frozenset[Entry]], ...]
    """What the store was and is, as far back as somebody may still see it."""
    notices: frozenset[int]
    mounts: tuple[Mount, ...]

    @property
    def store(self) -> frozenset[Entry]:
        return self.past[-1][1]


class Step(NamedTuple):
    text: str
    state: State
    misfortune: bool = False


@dataclass(frozen=True)
class Scenario:
    """`programs`: for each mount the calls of each owner."""

    name: str
    programs: tuple[tuple[tuple[Call, ...], ...], ...]
    alone: bool = True
    """Whether mounts may decide alone."""
