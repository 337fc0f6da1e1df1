"""What there is in the model: immutable, hashable, and as small as the rules allow.

A revision is the number of transactions that have changed the namespace. Taking and returning delegations does not
count: a value that was read before a delegation was taken, with no change in between, is as good as one read with it.
The version of a key is how often it has been written; 0 means that it is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NAME, OWN, COUNT = "name", "own", "count"
"""Kinds of keys: a name, a directory's (or many-named file's) own attributes, the number of subdirectories."""

KEPT, DROPPING, READY, DELETED, DELETED_ASKED_AGAIN = range(5)
"""A group that is given back: nothing to do; the kernel drops it; its key is to be deleted; the deletion was applied
but its reply is on its way; and it was asked for again meanwhile."""

UNKNOWN, EXPIRED = (-2, 0), (-1, 0)
"""An entry that the kernel must look up under the directory's lock; one that it asks for again without any lock."""


class Key(NamedTuple):
    directory: int
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class Mutation:
    """One operation that changes the namespace, itself and no other. `born`: the directory that it makes, or -1."""

    name: str
    writes: tuple[int, ...]
    exclusive: bool = False
    """It fails if the key exists."""
    born: int = -1
    after: int = -1
    """Nobody does it before this key exists."""
    locked: bool = False
    """It is prepared under the lock, and must not commit without it."""


class Cached(NamedTuple):
    version: int
    revision: int


class GroupState(NamedTuple):
    """The product's `Group`, frozen."""

    taken: int
    known: tuple[Cached | None, ...]
    children: int | None
    children_revision: int
    children_changed: int
    complete: bool


class Etcd(NamedTuple):
    """`history`: for each revision what its transaction did. `delegations`: (directory, session)."""

    versions: tuple[int, ...]
    history: tuple[tuple[Mutation, ...], ...] = ()
    delegations: frozenset[tuple[int, int]] = frozenset()
    waiting: frozenset[tuple[int, int, int]] = frozenset()
    """(directory, session, operation of it)."""
    notices: frozenset[tuple[int, int, int]] = frozenset()
    """(holder, directory, session of the writer whose lease the notice is bound to)."""
    leases: frozenset[int] = frozenset()
    lock: int = 0
    """The session that holds the lock."""


class Reader(NamedTuple):
    """A read that takes its group. `phase`: idle, asked, replied. `own`: own writes that returned meanwhile."""

    phase: str = "idle"
    key: int = 0
    session: int = 0
    version: int = 0
    revision: int = 0
    got: bool = False
    poisoned: bool = False
    own: tuple[tuple[int, Cached], ...] = ()


class Reply(NamedTuple):
    """A plain read's, on its way from etcd."""

    key: int
    cached: Cached


class Caller(NamedTuple):
    """One process that works through its program.

    `phase`: idle, sent, replied, conflict, claim, notify, wait, exists, lost. `batch`: what its transaction does now,
    `alone`: what goes out after that, one by one. `applied`: the revision of its transaction, 0 if it was not applied.
    """

    at: int = 0
    phase: str = "idle"
    session: int = 0
    batch: tuple[Mutation, ...] = ()
    alone: tuple[Mutation, ...] = ()
    applied: int = 0
    resent: bool = False
    poisoned: bool = False
    holders: frozenset[tuple[int, int]] = frozenset()
    claims: frozenset[int] = frozenset()
    """What others hold, as its transaction was told."""
    claimed: frozenset[int] = frozenset()
    """The groups on which etcd knows that it waits."""
    lock: int = 0
    """The session in which it took the lock."""


class Air(NamedTuple):
    """A reply to a LOOKUP that the kernel has not taken in. `locked`: the directory's lock is held for it."""

    key: int
    version: int
    session: int
    locked: bool


class Mount(NamedTuple):
    """`session`: 0 between a lost one and the next. `returns`: for each directory. `events`: recalls to be heard."""

    session: int
    valid: bool
    lives: int
    held: tuple[GroupState | None, ...]
    returns: tuple[int, ...]
    reader: Reader
    callers: tuple[Caller, ...]
    entries: tuple[tuple[int, int], ...]
    """What the kernel has of each key: (version, session under which it was given), UNKNOWN or EXPIRED."""
    air: Air | None = None
    reply: Reply | None = None
    events: frozenset[int] = frozenset()
    deaf: bool = False
    was_deaf: bool = False
    in_doubt: bool = False
    ghosts: frozenset[tuple[int, tuple[Mutation, ...]]] = frozenset()
    """Copies of transactions that were given up, which may still arrive: session, what they do."""
    crashed: bool = False


class State(NamedTuple):
    """There are more mounts than these: others, that cache nothing, may at any moment have read what etcd has now.
    So nothing older may be answered any more as soon as a transaction has been applied."""

    etcd: Etcd
    mounts: tuple[Mount, ...]


class Step(NamedTuple):
    """What may happen next. `misfortune`: nobody may count on it. `broken`: the invariant that it breaks, or ""."""

    text: str
    state: State
    misfortune: bool = False
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A small world. Programs: for each mount, for each of its callers, what it does, batch after batch.

    `reads`: the keys that each mount reads, to take their groups; `plain`: the
    mounts that read without taking, too. `kernel`: the kernel caches as well. Misfortunes, each for the mounts that
    are named: `lapses` (their lease may end), `crashes`, `gives_up` (operations at their deadline), `loses` (replies),
    `deaf` (their watch may break). `held`: who holds what at first: (directory, mount), and whether it
    is `complete`: all of it known.
    """

    name: str
    keys: tuple[Key, ...]
    programs: tuple[tuple[tuple[tuple[Mutation, ...], ...], ...], ...]
    reads: tuple[tuple[int, ...], ...]
    plain: tuple[int, ...] = ()
    rests: bool = False
    """A mount whose programs have ended reads no more: keeps the world small."""
    kernel: bool = False
    lapses: tuple[int, ...] = ()
    crashes: tuple[int, ...] = ()
    gives_up: tuple[int, ...] = ()
    loses: tuple[int, ...] = ()
    deaf: tuple[int, ...] = ()
    held: tuple[tuple[int, int], ...] = ()
    complete: bool = True

    @property
    def directories(self) -> int:
        return 1 + max(key.directory for key in self.keys)

    @property
    def born(self) -> frozenset[int]:
        """The directories that are made in it."""
        calls = (mutation for mount in self.programs for program in mount for batch in program for mutation in batch)
        return frozenset(mutation.born for mutation in calls if mutation.born >= 0)
