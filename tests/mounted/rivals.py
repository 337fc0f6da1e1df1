"""Two clients (`client.py`), each on a mount of its own, that change one directory at once and watch each other.

Some names belong to one side: what these mean is known exactly, version by version, in memory that both sides share.
An owner says that a version has begun before its call and that it is done after the return; so a look at such a name
from the other side must see the version that was done before the look began, or a later one that has begun. No file
moves from one such name to another: stat finds a file by its name first and its attributes then, and would show, here
as anywhere, what has become of it under the new name. The other names are changed by both; what these mean is compared
when both sides are at rest.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from time import monotonic

from tests.mounted.clients import errno_of

BOUND_S = 45.0
"""How long one side waits for the other; less than a client may take to answer (`client.DEADLINE_S`)."""
OWN_NAMES = 3
SHARED_NAMES = [f"shared{number}" for number in range(4)]
ABSENT_NAMES = ["never0", "never1"]
CALLS_IN_ROUND = 4
LOOKS = 2
"""The first takes the directory, the second fills the kernel's cache."""
VERSIONS_KEPT = 1024
CONTESTED = (0, errno.ENOENT, errno.EEXIST, errno.ESTALE)
"""What a change of a name that the other side changes too may answer."""


def own_names(side: int) -> list[str]:
    return [f"own{side}{number}" for number in range(OWN_NAMES)]


@dataclass(frozen=True)
class Tally:
    """What one side has done in some rounds."""

    changes: int
    looks: int
    slowest_s: float
    slowest: str


class Versions:
    """What each owned name means: its mode, which no other of the last versions has, or 0 if it is absent."""

    def __init__(self, path: Path) -> None:
        """`path` is a file of `size_bytes()` zeros, outside the mounts."""
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    @staticmethod
    def size_bytes() -> int:
        return 2 * OWN_NAMES * 8 * (2 + VERSIONS_KEPT)

    def begun(self, slot: int) -> int:
        return self._words[slot * (2 + VERSIONS_KEPT)]

    def done(self, slot: int) -> int:
        return self._words[slot * (2 + VERSIONS_KEPT) + 1]

    def begin(self, slot: int, meaning: int) -> None:
        """The owner is about to make its next version."""
        at, version = slot * (2 + VERSIONS_KEPT), self.begun(slot) + 1
        self._words[at + 2 + version % VERSIONS_KEPT] = meaning
        self._words[at] = version

    def end(self, slot: int) -> None:
        """The owner's call has returned."""
        self._words[slot * (2 + VERSIONS_KEPT) + 1] = self.begun(slot)

    def meaning(self, slot: int, version: int) -> int:
        return self._words[slot * (2 + VERSIONS_KEPT) + 2 + version % VERSIONS_KEPT]

    def newest(self, slot: int) -> int:
        return self.meaning(slot, self.begun(slot))

    def next_mode(self, slot: int) -> int:
        """For a file of the owner's next version."""
        return stat.S_IFREG | (self.begun(slot) + 1) & 0o777


class Rival:
    """One side. Raises AssertionError for what is stale or failed, TimeoutError where the other side does not come."""

    def __init__(self, directory: Path, side: int, versions: Versions, peer: Connection) -> None:
        self._directory = directory
        self._side = side
        self._versions = versions
        self._peer = peer
        self._rng = random.Random(side)
        self._changes = self._looks = 0
        self._slowest = (0.0, "")

    def play(self, rounds: int) -> Tally:
        self._changes = self._looks = 0
        self._slowest = (0.0, "")
        try:
            for _ in range(rounds):
                self._play_round()
        except BaseException:
            self._peer.close()  # let the other side go
            raise
        return Tally(self._changes, self._looks, *self._slowest)

    def _play_round(self) -> None:
        for _ in range(LOOKS):
            self._watch()
            for name in (*SHARED_NAMES, *own_names(self._side), *ABSENT_NAMES):
                self._timed(os.lstat, self._directory / name)
        self._exchange("looked")
        for _ in range(CALLS_IN_ROUND):
            if self._rng.random() < 0.5:
                self._change_own()
            else:
                self._change_shared()
            self._watch()
        self._exchange("changed")
        mine = self._view()
        theirs = self._exchange(mine)
        assert mine == theirs, "both are at rest and see different things"

    def _exchange(self, message: object) -> object:
        """Tell the other side, and wait for what it tells: both are here then."""
        self._peer.send(message)
        if not self._peer.poll(BOUND_S):
            raise TimeoutError("the other side does not come")
        found: object = self._peer.recv()
        return found

    def _timed(self, function: Callable[..., object], *args: object) -> int:
        began = monotonic()
        found = errno_of(function, *args)
        self._slowest = max(self._slowest, (monotonic() - began, function.__name__))
        return found

    # -- changing ----------------------------------------------------------------------------------------------------

    def _change_own(self) -> None:
        slot = self._side * OWN_NAMES + self._rng.randrange(OWN_NAMES)
        mode, path = self._versions.next_mode(slot), self._path(slot)
        if not self._versions.newest(slot):
            self._rng.choice((self._make, self._move_in))(slot, mode)
        elif (kind := self._rng.randrange(3)) == 0:
            self._change(slot, 0, os.unlink, path)
        elif kind == 1:
            self._move_in(slot, mode)
        else:
            self._change(slot, mode, os.chmod, path, stat.S_IMODE(mode))

    def _make(self, slot: int, mode: int) -> None:
        self._change(slot, mode, os.mknod, self._path(slot), mode)

    def _move_in(self, slot: int, mode: int) -> None:
        spare = self._directory / f"spare{self._side}"
        assert self._timed(os.mknod, spare, mode) == 0
        self._change(slot, mode, os.rename, spare, self._path(slot))

    def _change(self, slot: int, meaning: int, function: Callable[..., object], *args: object) -> None:
        self._versions.begin(slot, meaning)
        found = self._timed(function, *args)
        assert found == 0, f"{function.__name__}{args}: {errno.errorcode.get(found, found)}"
        self._versions.end(slot)
        self._changes += 1

    def _change_shared(self) -> None:
        path, other = (self._directory / self._rng.choice(SHARED_NAMES) for _ in range(2))
        operations: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (os.mknod, (path,)),
            (Path.touch, (path,)),
            (os.unlink, (path,)),
            (os.rename, (path, other)),
            (os.link, (path, other)),
            (os.mkdir, (f"{path}.d",)),
            (os.rmdir, (f"{path}.d",)),
        ]
        function, args = self._rng.choice(operations)
        found = self._timed(function, *args)
        assert found in CONTESTED, f"{function.__name__}{args}: {errno.errorcode.get(found, found)}"
        self._changes += found == 0

    # -- looking -----------------------------------------------------------------------------------------------------

    def _path(self, slot: int) -> Path:
        side, number = divmod(slot, OWN_NAMES)
        return self._directory / own_names(side)[number]

    def _watch(self) -> None:
        """See what the other side's names mean: nothing older than what had returned before we looked."""
        for slot in range((1 - self._side) * OWN_NAMES, (2 - self._side) * OWN_NAMES):
            done = self._versions.done(slot)
            seen = self._mode(self._path(slot))
            allowed = [self._versions.meaning(slot, version) for version in range(done, self._versions.begun(slot) + 1)]
            assert seen in allowed, f"{self._path(slot)} is {seen:o}, not one of {[f'{mode:o}' for mode in allowed]}"
            self._looks += 1

    def _mode(self, path: Path) -> int:
        modes = [0]
        found = self._timed(lambda: modes.append(os.lstat(path).st_mode))
        assert found in (0, errno.ENOENT)
        return modes[-1]

    def _view(self) -> dict[str, object]:
        """All there is to see in the directory, and of it."""
        listed = sorted(os.listdir(self._directory))
        view: dict[str, object] = {name: self._attributes(self._directory / name) for name in (*listed, ".")}
        for name in (*SHARED_NAMES, *own_names(0), *own_names(1), *ABSENT_NAMES):
            assert (errno_of(os.lstat, self._directory / name) == 0) == (name in listed), name
        return view

    def _attributes(self, path: Path) -> tuple[int, ...]:
        found = os.lstat(path)
        return found.st_ino, found.st_mode, found.st_nlink, found.st_mtime_ns, found.st_ctime_ns


SIDES: dict[int, Rival] = {}
"""The side that this client plays."""
LISTENERS: list[Listener] = []


def listen(address: str) -> None:
    """Let the other side come; then `accept`."""
    LISTENERS.append(Listener(address, "AF_UNIX"))


def accept(directory: Path, versions: Path) -> None:
    """Be the first side; returns when the second has come."""
    os.umask(0)
    with LISTENERS.pop() as listener:
        SIDES[0] = Rival(directory, 0, Versions(versions), listener.accept())


def join(directory: Path, versions: Path, address: str) -> None:
    """Be the second side; the first must listen."""
    os.umask(0)
    SIDES[1] = Rival(directory, 1, Versions(versions), connection.Client(address, "AF_UNIX"))


def play(side: int, rounds: int) -> Tally:
    return SIDES[side].play(rounds)
