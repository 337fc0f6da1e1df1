"""What an advisory lock is, and how locks are written in the store.

`k/<ino>/<kind>/h/<session>` says everything that one session's owners hold, `.../w/<session>/<ticket>` one request
that waits. Both name the session in the value too, so that nobody has to take a key apart.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord, TooManyLocks

RANGE_END = (1 << 63) - 1
"""The last byte of a lock that reaches to the end of the file; flock locks are 0..RANGE_END."""
RANGES_MAX = 10_000
"""Ranges that one mount may hold on one inode."""
RECORD_BYTES_MAX = 512 << 10
"""Their record's size."""


class LockKind(enum.IntEnum):
    """Locks of different kinds know nothing of each other."""

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


def encode_held(session: int, held: Sequence[Lock]) -> bytes:
    """What a session holds on an inode. Raises TooManyLocks."""
    if len(held) > RANGES_MAX:
        raise TooManyLocks(f"more than {RANGES_MAX} locked ranges on one inode")
    data = codec.encode_fields([session, [_fields(lock) for lock in held]])
    if len(data) > RECORD_BYTES_MAX:
        raise TooManyLocks("the locks on one inode do not fit in their record")
    return data


def decode_held(data: bytes) -> tuple[Lock, ...]:
    """Raises CorruptRecord, UnsupportedFormat."""
    fields = codec.decode_fields(data)
    try:
        session, held = fields
        return tuple(_lock(session, each) for each in held)
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"a record of held locks does not decode: {exc}") from exc


def encode_waiting(lock: Lock) -> bytes:
    """A request that waits."""
    return codec.encode_fields([lock.session, _fields(lock)])


def decode_waiting(data: bytes) -> Lock:
    """Raises CorruptRecord, UnsupportedFormat."""
    fields = codec.decode_fields(data)
    try:
        session, wanted = fields
        return _lock(session, wanted)
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"a record of a waiting lock does not decode: {exc}") from exc


def _fields(lock: Lock) -> list[int]:
    return [lock.owner, lock.start, lock.end, int(lock.type), lock.pid]


def _lock(session: int, fields: Sequence[int]) -> Lock:
    owner, start, end, type_, pid = fields
    return Lock(session, owner, start, end, LockType(type_), pid)
