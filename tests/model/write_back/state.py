"""What there is in the model of write-back: immutable, hashable, and as small as the rules allow.

A value is the number of the operation that wrote it, 0 what was there at first (nothing). `State.truth` is the order in
which operations became true: an operation that is answered ahead of etcd when it is answered, any other when it is
applied. A read must answer what was true at some moment between its call and its return. When a session ends, what it
had answered and not committed leaves the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

KEPT, ASKED, DELETED, DELETED_ASKED_AGAIN = range(4)
"""A key that goes (a delegation's, or that it is exclusive): nothing to do; it is to be deleted; the deletion was
applied and its reply is on its way; and it was asked for again meanwhile."""

DROP, SHARE = "drop", "share"
"""What a notice asks for."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation on one key. `needs`: whether the name must be there, None if it may or may not."""

    name: str
    key: int
    makes: bool = True
    """Whether the name is there afterwards."""
    needs: bool | None = None
    born: int = -1
    """The directory that it makes, or -1."""
    after: int = -1
    """Nobody does it before this key has been written in etcd."""
    waits: bool = False
    """It answers only when it is in etcd, as rename does."""


class Write(NamedTuple):
    """An operation by its number, and the value that it was decided on."""

    number: int
    seen: int


class Cached(NamedTuple):
    """`as_of`: a revision, or QUEUED."""

    value: int
    as_of: int


class Held(NamedTuple):
    """A held group. `claim`: the number of the transaction under way that makes it exclusive, or 0."""

    taken: int
    known: tuple[Cached | None, ...]
    exclusive: bool = False
    claim: int = 0


class Etcd(NamedTuple):
    """Pairs are (directory, session). `revision`: how many transactions have changed values."""

    values: tuple[int, ...]
    revision: int = 0
    delegations: frozenset[tuple[int, int]] = frozenset()
    exclusive: frozenset[tuple[int, int]] = frozenset()
    waiting: frozenset[tuple[int, int]] = frozenset()
    leases: frozenset[int] = frozenset()
    ahead: frozenset[tuple[int, int]] = frozenset()
    """What has been answered and is not here yet: (operation, session)."""
    owed: frozenset[int] = frozenset()
    """Operations that are not in etcd although one that came after them, of the same mount, is."""


class Flight(NamedTuple):
    """The committer's transaction. `applied`: its revision, 0 if it was not applied. `phase`: sent, replied."""

    session: int
    writes: tuple[Write, ...]
    phase: str = "sent"
    applied: int = 0
    resent: bool = False


class Caller(NamedTuple):
    """One process that works through its program.

    `phase`: idle, begun, sent, fresh, replied, conflict, wait, lost, settle. `seen`: the value that its transaction
    compares, -1: not known. `floor`: how much was true when it was called. `behind`: what was queued then. `claim`: the
    number of its claim, 0: none.
    """

    at: int = 0
    phase: str = "idle"
    session: int = 0
    seen: int = -1
    floor: int = 0
    behind: frozenset[int] = frozenset()
    claim: int = 0
    applied: int = 0
    shared: bool = False
    poisoned: bool = False
    """Of the directory that it makes: wanted for reading, or for writing, before the reply has come."""


class Reader(NamedTuple):
    """One read. `phase`: idle, begun, asked, replied, sharing. `relied`: the directories that were held when it was
    sent. `holders`: who holds exclusively what it has read, (directory, session)."""

    phase: str = "idle"
    keys: tuple[int, ...] = ()
    takes: int = -1
    turn: bool = False
    """It takes the group exclusively, and all of it."""
    session: int = 0
    floor: int = 0
    relied: frozenset[int] = frozenset()
    values: tuple[int, ...] = ()
    revision: int = 0
    holders: frozenset[tuple[int, int]] = frozenset()
    got: bool = False
    poisoned: bool = False
    own: tuple[tuple[int, int, int], ...] = ()
    """Own writes that returned meanwhile: key, value, revision."""

    def takes_turn(self, directory: int) -> bool:
        """Whether a turn on it was asked for, and its reply has not been taken."""
        return self.turn and self.takes == directory and self.phase in ("asked", "replied")


class Mount(NamedTuple):
    """`session`: 0 between a lost one and the next. `returns`, `shares`: for each directory. `events`: notices."""

    session: int
    valid: bool
    lives: int
    held: tuple[Held | None, ...]
    returns: tuple[int, ...]
    shares: tuple[int, ...]
    callers: tuple[Caller, ...]
    reader: Reader = Reader()
    reads_left: int = 0
    queue: tuple[Write, ...] = ()
    flight: Flight | None = None
    ghosts: frozenset[Flight] = frozenset()
    """Copies of transactions that were given up, which may still arrive."""
    events: frozenset[tuple[int, str]] = frozenset()
    crashed: bool = False


class State(NamedTuple):
    etcd: Etcd
    truth: tuple[int, ...]
    mounts: tuple[Mount, ...]


class Step(NamedTuple):
    """What may happen next. `misfortune`: nobody may count on it. `broken`: the invariant that it breaks, or ""."""

    text: str
    state: State
    misfortune: bool = False
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A small world. `keys`: the directory of each. Programs: for each mount, for each of its processes, what it does.

    `reads`: for each mount the sets of keys that it asks for at once, `reads_max` times; `takes` them: the group of the
    first key with it; the mounts `turns` take it exclusively, and the keys are all of that group. `rereads`: it asks
    even for what it has cached. Misfortunes, each for the mounts that are named: `lapses` (their lease may end),
    `crashes`, `loses` (replies to the committer), `gives_up` (its transactions at a deadline). `held`: (directory,
    mount) at first, complete, and of those `exclusive`.
    """

    name: str
    keys: tuple[int, ...]
    programs: tuple[tuple[tuple[Operation, ...], ...], ...]
    reads: tuple[tuple[tuple[int, ...], ...], ...]
    reads_max: int = 1
    takes: bool = False
    turns: tuple[int, ...] = ()
    rereads: bool = False
    lapses: tuple[int, ...] = ()
    crashes: tuple[int, ...] = ()
    loses: tuple[int, ...] = ()
    gives_up: tuple[int, ...] = ()
    held: tuple[tuple[int, int], ...] = ()
    exclusive: tuple[tuple[int, int], ...] = ()

    @property
    def directories(self) -> int:
        return 1 + max(self.keys)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Each by its number, which is never 0."""
        nothing = Operation("nothing", -1, makes=False)
        return (nothing, *(operation for mount in self.programs for program in mount for operation in program))
