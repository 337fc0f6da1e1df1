"""What is kept of a seal: one key for each, `Z/<seal>`, and the number of it in every inode that it covers.

A seal is of a directory and all below it, for a term. Its phases:

    SEALING   the tree is walked: each inode gets the seal's number, from the top down. Nobody may change what has it.
    SEALED    all of it has the number. Mounts may trust the seal (`seals.py`): cache what it covers, without
              delegations, for one term after they last heard that this record is as it was.
    ENDING    nobody begins to trust it any more; who did is asked, or waited for.
    OPENING   nobody trusts it. The tree is walked from the bottom up, and the number taken out again.

The directories on the way to the tree are *waypoints* (`InodeFlag.WAYPOINT`): their names, owners and modes stay as
well, so that a mount that is cut off still finds the tree by its path.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from apollofs.metadata import codec
from apollofs.metadata.name_text import name_text

SEALS_MAX = 1000
"""Standing seals of a volume: mounts read all of them to confirm those that they trust."""
TERM_S_MIN = 10.0
TERM_S_MAX = 30 * 86_400.0
"""Unsealing waits as long for a mount that is cut off, or has died."""


class Phase(enum.IntEnum):
    """Numbers are stored: never reuse one."""

    SEALING = 1
    SEALED = 2
    ENDING = 3
    OPENING = 4


@dataclass(frozen=True, slots=True)
class SealRecord:
    """Value of `Z/<seal>`. `revision` is its mod_revision, and not encoded."""

    number: int
    root: int
    """Inode of the directory."""
    term_s: float
    phase: Phase
    path: tuple[tuple[int, bytes], ...]
    """Where it is: (directory, name) of each component, from the volume's root; empty for that itself."""
    since_ns: int
    """When it was asked for."""
    has_term: bool = False
    """It has ended, and the term for those who are silent has begun: `Y/<seal>` says whether it still runs."""
    revision: int = 0

    @property
    def path_text(self) -> str:
        """As a person writes it."""
        return "/" + "/".join(name_text(name) for _, name in self.path)

    def in_phase(self, phase: Phase) -> SealRecord:
        return replace(self, phase=phase)


@dataclass(frozen=True, slots=True)
class SealCount:
    """Value of `Z`: the number that was given out last, and how many seals stand. Whoever makes or removes a seal
    compares and puts it, so the waypoints are changed by one at a time."""

    last: int = 0
    standing: int = 0


def encode_seal(record: SealRecord) -> bytes:
    flat = [part for place in record.path for part in place]
    fields = [record.number, record.root, record.term_s, int(record.phase), flat, record.since_ns, record.has_term]
    return codec.encode_fields(fields)


def decode_seal(data: bytes, revision: int) -> SealRecord:
    """Raises CorruptRecord, UnsupportedFormat."""
    number, root, term_s, phase, flat, since_ns, has_term = codec.decode_fields(data)
    path = tuple((flat[at], flat[at + 1]) for at in range(0, len(flat), 2))
    return SealRecord(number, root, float(term_s), Phase(phase), path, since_ns, bool(has_term), revision)


def encode_count(count: SealCount) -> bytes:
    return codec.encode_fields([count.last, count.standing])


def decode_count(data: bytes) -> SealCount:
    return SealCount(*codec.decode_fields(data))
