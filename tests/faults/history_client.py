"""What the processes of a random schedule do, and write down: see `test_histories.py`.

All processes have the same idea of when a group of names is left in peace, mostly, and when everybody changes it.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from time import monotonic

from tests.support.history import TOKEN_BYTES, Kind, Operation
from tests.support.history.records import decode, encode

GROUPS = (("0/a", "0/b"), ("1/a", "1/b"), ("2/a", "2/b"), ("3/a", "3/b", "4/a"))
"""Names among which files move."""
DIRECTORIES = ("0", "1", "2", "3", "4")
HEATS = (0.005, 0.005, 0.02, 0.4)
"""How many of the operations on a group are changes, by turns. Seldom enough that all mounts, and their kernels, have
come to cache the group; or so often that none does."""
TURN_S = 0.9
"""Longer than a mount leaves a directory alone after a first recall."""
PAUSE_MEAN_S = 0.01
PAUSE_MOST_S = 0.05
CHANGES = (Kind.CREATE, Kind.CREATE, Kind.UNLINK, Kind.RENAME, Kind.REPLACE, Kind.APPEND, Kind.APPEND)
LOOKS = (Kind.STAT, Kind.READ)
TOKENS_MAX = 10_000
NUMBERS_EACH = 1_000_000
GONE = (errno.ENOTCONN, errno.ECONNABORTED)
"""The daemon is dead. ENOTCONN: the request was not sent."""
TELLING = {**dict.fromkeys(Kind, errno.ENOENT), Kind.CREATE: errno.EEXIST, Kind.REPLACE: 0}
"""The errno that says something about the names, of each kind of call."""
HARMLESS = (errno.EIO, errno.ESTALE, errno.EINTR, *GONE)
"""What a fault may answer with."""


@dataclass(frozen=True)
class Part:
    """What one process has to do in a schedule."""

    seed: int
    process: int
    host: str
    root: Path
    began_s: float
    """By `monotonic`; turns are counted from here."""
    until_s: float
    first: int
    """The number of its first operation in this life of its mount."""


@dataclass
class Told:
    """What a process has to tell: its history, and which errors it met that say nothing about the namespace."""

    history: list[Operation] = field(default_factory=list)
    errors: Counter[tuple[Kind, int]] = field(default_factory=Counter)
    """By kind of call and errno."""


class Gone(Exception):
    """The daemon of the mount is dead."""


class Actor:
    """One process."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._rng = random.Random(f"{part.seed} {part.process} {part.first}")
        self._numbers = itertools.count(part.process * NUMBERS_EACH + part.first + 1)
        self.told = Told()

    def act(self) -> None:
        """One operation on a name of a group. Raises Gone once the mount is dead."""
        number = self._rng.randrange(len(GROUPS))
        turn = int((monotonic() - self._part.began_s) / TURN_S)
        heat = random.Random(f"{self._part.seed} {number} {turn}").choice(HEATS)
        kind = self._rng.choice(CHANGES if self._rng.random() < heat else LOOKS)
        self.do(kind, *self._rng.sample(GROUPS[number], 2 if kind is Kind.RENAME else 1))

    def do(self, kind: Kind, *names: str) -> None:
        """Do it, and write it down if it says something."""
        call = _Call(self._part, kind, names, next(self._numbers))
        try:
            self.told.history += call.run()
        except OSError as exc:
            if exc.errno not in HARMLESS:
                raise
            self.told.errors[kind, exc.errno] += 1
            self.told.history += call.failed(exc.errno)
            if exc.errno in GONE:
                raise Gone from None


class _Call:
    """One operation while it runs."""

    def __init__(self, part: Part, kind: Kind, names: tuple[str, ...], number: int) -> None:
        self._part = part
        self._kind = kind
        self._names = names
        self._number = number
        self._path = part.root / names[0]
        self._began_s = monotonic()
        self._ino = 0
        self._is_open = False
        """An append has found its file."""
        self._is_change = False
        """What was sent last may have changed what others see."""

    def run(self) -> list[Operation]:
        """Nothing where it was refused for a reason that is not the namespace's. Raises OSError; then `failed` has
        what is to be written down."""
        try:
            return [getattr(self, f"_{self._kind}")()]
        except OSError as exc:
            if exc.errno == TELLING[self._kind] and not self._is_open:
                return [self._operation(error=exc.errno)]
            raise

    def failed(self, number: int) -> list[Operation]:
        """After this errno: a change whose outcome is unknown, or nothing."""
        refused = number in (errno.ESTALE, errno.ENOTCONN) and self._kind is not Kind.APPEND
        return [self._operation(unknown=True, ino=self._ino)] if self._is_change and not refused else []

    def _operation(
        self, *, error: int = 0, unknown: bool = False, ino: int = 0, size: int = 0, tokens: tuple[int, ...] = ()
    ) -> Operation:
        part, process = self._part, f"p{self._part.process}"
        kind, names, number = self._kind, self._names, self._number
        return Operation(
            process, part.host, kind, names, number, self._began_s, monotonic(), error, unknown, ino, size, tokens
        )

    def _create(self) -> Operation:
        self._is_change = True
        fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        done = self._operation()
        with closing(fd), suppress(OSError):
            done = replace(done, ino=os.fstat(fd).st_ino)
        return done

    def _unlink(self) -> Operation:
        self._is_change = True
        self._path.unlink()
        return self._operation()

    def _rename(self) -> Operation:
        self._is_change = True
        self._path.rename(self._part.root / self._names[1])
        return self._operation()

    def _replace(self) -> Operation:
        """The file is made under a name of its own; its rename is the operation."""
        own = self._path.with_name(f".{self._number}")
        fd = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with closing(fd):
            os.write(fd, encode(self._number))
            os.fsync(fd)
            ino = os.fstat(fd).st_ino
        self._began_s = monotonic()
        self._is_change = True
        own.rename(self._path)
        return self._operation(ino=ino)

    def _append(self) -> Operation:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        with closing(fd):
            self._is_open = True
            self._ino = os.fstat(fd).st_ino
            self._is_change = True
            os.write(fd, encode(self._number))
            os.fsync(fd)
            return self._operation(ino=self._ino)

    def _stat(self) -> Operation:
        found = self._path.stat()
        return self._operation(ino=found.st_ino, size=found.st_size)

    def _read(self) -> Operation:
        fd = os.open(self._path, os.O_RDONLY)
        with closing(fd):
            return self._operation(tokens=decode(os.read(fd, TOKENS_MAX * TOKEN_BYTES)))


@contextmanager
def closing(fd: int) -> Iterator[None]:
    """Close it in the end. That an operation can't be closed any more does not change what it was."""
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(fd)


def act(part: Part) -> Told:
    """Operations at random until the time is over or the mount is dead."""
    actor, pause, rng = Actor(part), Event(), random.Random(part.seed)
    with suppress(Gone):
        while monotonic() < part.until_s:
            actor.act()
            pause.wait(min(rng.expovariate(1 / PAUSE_MEAN_S), PAUSE_MOST_S))
    return actor.told


def survey(part: Part) -> Told:
    """Look at every name once it is answered. Raises Gone if the mount is dead, TimeoutError after `until_s`."""
    actor = Actor(part)
    for kind, name in itertools.product(LOOKS, itertools.chain(*GROUPS)):
        before = len(actor.told.history)
        while len(actor.told.history) == before:
            if monotonic() > part.until_s:
                raise TimeoutError(f"{part.host} does not answer: {actor.told.errors}")
            actor.do(kind, name)
    return actor.told


def prepare(root: Path) -> None:
    """The directories of a schedule."""
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
