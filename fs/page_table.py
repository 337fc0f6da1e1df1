"""The inodes whose pages the kernel may have, and until when the lease is proven: shared with the guard (`guard.py`).

A file without a name, mapped by the daemon and by its guard, of 8-byte words in this machine's order:

    0        until when the lease is proven: nanoseconds since boot (CLOCK_BOOTTIME); 0: not known yet
    1        how many slots have ever been in use
    2        how often the guard has dropped everything
    8...     slots: an inode number, or 0

Only the daemon writes, the third word aside, which only the guard writes. A word is written at once, never torn, and
an inode is in the table before the reply to its OPEN lets the kernel have pages of it.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

INODES_MAX = 1 << 18
"""Open files that a guard can watch over: 2 MiB of memory, of which only what is used is taken."""
_UNTIL, _USED, _DROPS, _SLOTS = 0, 1, 2, 8
_WORD = 8
NANOSECONDS = 1_000_000_000


class PageWatch(Protocol):
    """What open files tell about pages of theirs."""

    def add(self, ino: int) -> bool:
        """One more handle may fill the kernel's page cache. False: it must not, let it be DIRECT_IO."""
        ...

    def remove(self, ino: int) -> None:
        """One of these handles is closed, and every mapping that was made of it has gone."""
        ...


class Unwatched:
    """A mount without a guard."""

    def add(self, ino: int) -> bool:
        return True

    def remove(self, ino: int) -> None:
        pass


class PageTable:
    """The daemon's side. Costs no system call but the first touch of a page."""

    def __init__(self, inodes_max: int = INODES_MAX) -> None:
        self.fd = os.memfd_create("apollofs-pages")
        os.ftruncate(self.fd, (_SLOTS + inodes_max) * _WORD)
        self._words = memoryview(mmap.mmap(self.fd, 0)).cast("Q")
        self._inodes_max = inodes_max
        self._slots: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        self._free: list[int] = []

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last reference to this."""
        os.close(self.fd)

    def prove(self, until_s: float) -> None:
        """The lease is proven until `until_s`, in seconds since boot."""
        self._words[_UNTIL] = int(until_s * NANOSECONDS)

    def add(self, ino: int) -> bool:
        """As `PageWatch`; False once INODES_MAX inodes are open."""
        if ino not in self._slots:
            if not self._free:
                if self._words[_USED] == self._inodes_max:
                    return False
                self._free.append(self._words[_USED])
                self._words[_USED] += 1
            slot = self._free.pop()
            self._words[_SLOTS + slot] = ino
            self._slots[ino] = slot
        self._handles[ino] = self._handles.get(ino, 0) + 1
        return True

    def remove(self, ino: int) -> None:
        """As `PageWatch`."""
        self._handles[ino] -= 1
        if not self._handles[ino]:
            del self._handles[ino]
            slot = self._slots.pop(ino)
            self._words[_SLOTS + slot] = 0
            self._free.append(slot)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def drops(self) -> int:
        """How often the guard has dropped everything."""
        return self._words[_DROPS]


class PageTableView:
    """The guard's side of the table behind `fd`."""

    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, 0)).cast("Q")

    @property
    def proven_until_s(self) -> float:
        """Seconds since boot; 0: not known yet."""
        return self._words[_UNTIL] / NANOSECONDS

    def inodes(self) -> list[int]:
        """Those that are open now; one that is opened or closed meanwhile may be among them or not."""
        return [ino for ino in self._words[_SLOTS : _SLOTS + self._words[_USED]].tolist() if ino]

    def note_drop(self) -> None:
        """Everything is being dropped, once more."""
        self._words[_DROPS] += 1
