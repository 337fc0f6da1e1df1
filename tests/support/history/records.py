"""One call of one process: what it asked for, when, and what came of it."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

TOKEN_BYTES = 16
"""Every file of a history is a row of tokens, each the number of the operation that wrote it."""
DAMAGED = -1
"""Stands for bytes that are no token: nothing explains them."""


class Kind(enum.StrEnum):
    """What a process can do. A replace is the rename of a file that nobody else knew."""

    CREATE = "create"
    UNLINK = "unlink"
    RENAME = "rename"
    REPLACE = "replace"
    APPEND = "append"
    STAT = "stat"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that ended, or whose process was told an error that leaves open whether it ever happens.

    Times are of one clock for all processes, in seconds. What was refused for sure and says nothing about the namespace
    (a read that met EIO) does not belong in a history.
    """

    process: str
    """Its operations follow one another."""
    host: str
    """The mount that was asked; another one after each new start of the daemon."""
    kind: Kind
    names: tuple[str, ...]
    """One name, or from and to."""
    number: int
    """Positive and unique in the history; the token that a replace or an append writes."""
    invoked_s: float
    returned_s: float
    error: int = 0
    """0, ENOENT or EEXIST."""
    unknown: bool = False
    """Whether it may have happened, may happen at any time from its call on, or never."""
    ino: int = 0
    """The inode number that was made, opened or seen; 0: not known."""
    size: int = 0
    """What stat said, in bytes."""
    tokens: tuple[int, ...] = ()
    """What was read."""

    def __post_init__(self) -> None:
        assert self.number > 0
        assert self.error in (0, errno.ENOENT, errno.EEXIST)
        assert self.invoked_s <= self.returned_s
        assert not (self.unknown and self.only_looks), "what changes nothing and says nothing"

    @property
    def only_looks(self) -> bool:
        """Whether it changes nothing: it looked, or it was refused for what there is or is not."""
        return self.kind in (Kind.STAT, Kind.READ) or self.error != 0

    @property
    def goes_through_name(self) -> bool:
        """Whether it finds an inode by its name first, and what it does then depends on that."""
        if self.kind is Kind.RENAME:
            return not self.error and not self.unknown
        return self.kind in (Kind.STAT, Kind.READ, Kind.APPEND) and not self.error

    def __str__(self) -> str:
        what = f"{self.number} {self.process}@{self.host} {self.kind} {' '.join(self.names)}"
        if self.unknown:
            result = "unknown"
        elif self.error:
            result = errno.errorcode[self.error]
        elif self.kind is Kind.READ:
            result = f"tokens {self.tokens}"
        else:
            result = f"ino {self.ino:#x} size {self.size}" if self.kind is Kind.STAT else f"ok ino {self.ino:#x}"
        return f"[{self.invoked_s:.6f} {self.returned_s:.6f}] {what}: {result}"


def encode(token: int) -> bytes:
    """TOKEN_BYTES bytes."""
    return b"%0*d\n" % (TOKEN_BYTES - 1, token)


def decode(data: bytes) -> tuple[int, ...]:
    """The tokens of a file; DAMAGED for each piece that is none."""
    pieces = [data[at : at + TOKEN_BYTES] for at in range(0, len(data), TOKEN_BYTES)]
    return tuple(
        int(piece) if len(piece) == TOKEN_BYTES and piece[:-1].isdigit() and piece.endswith(b"\n") else DAMAGED
        for piece in pieces
    )
