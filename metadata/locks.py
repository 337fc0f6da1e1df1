"""Advisory locks over all mounts: flock(2) and fcntl(2) ranges. (bodies being written)"""

from __future__ import annotations

import enum
from dataclasses import dataclass

RANGE_END = (1 << 63) - 1
"""The last byte of a lock that reaches to the end of the file; flock locks are 0..RANGE_END."""


class LockKind(enum.IntEnum):
    POSIX = 0
    FLOCK = 1


class LockType(enum.IntEnum):
    SHARED = 0
    EXCLUSIVE = 1


@dataclass(frozen=True, slots=True)
class Lock:
    """Bytes [start, end] (inclusive) locked by `owner` (the kernel's lock owner number) of `session`."""

    session: int
    owner: int
    start: int
    end: int
    type: LockType
    pid: int


class LockManager:
    """All raise SessionLost, StoreError, DeadlineExceeded besides what is named."""

    def __init__(self, *a: object) -> None: ...
    def begin(self, s: object) -> None: ...
    def end(self) -> None: ...

    async def acquire(
        self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType, pid: int, *, wait: bool
    ) -> None:
        """Raises LockConflict (not wait), LockDeadlock, TooManyLocks. Replaces what the owner held in the range.

        Cancellation while waiting leaves the queue and holds nothing new. flock conversion is not atomic, as in Linux.
        """

    async def release(self, ino: int, kind: LockKind, owner: int, start: int = 0, end: int = RANGE_END) -> None:
        """Give back what the owner holds in the range; no request if this mount knows that it holds nothing there."""

    def holds(self, ino: int, kind: LockKind, owner: int) -> bool:
        """Whether this mount holds, or is acquiring, a lock for that owner. No request."""
        return False

    async def test(self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType) -> Lock | None:
        """The first lock that would stand in the way, or None (F_GETLK). One request."""
