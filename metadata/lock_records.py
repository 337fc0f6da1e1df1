"""What an advisory lock is, and how locks are written in the store.

`k/<ino>/<kind>/h/<session>` says everything that one session's owners hold, or that this session alone decides who
holds what; `.../w/<session>/<ticket>` is one request. Both name the session in the value too, so that nobody has to
take a key apart.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True)
class Holding:
    """One session's key. `sole`: it decides alone, and `locks` says nothing."""

    session: int
    locks: tuple[Lock, ...]
    sole: bool


class Arrival(NamedTuple):
    """The order in which requests are served: the revision that made the request's key, or, for one that came while
    its session decided alone, that of the session's key and the request's own number."""

    revision: int
    ticket: int = 0


def check_count(held: Sequence[Lock]) -> None:
    """Raises TooManyLocks if they could not be told to the store."""
    if len(held) > RANGES_MAX:
        raise TooManyLocks(f"more than {RANGES_MAX} locked ranges on one inode")


def encode_held(session: int, held: Sequence[Lock]) -> bytes:
    """What a session holds on an inode. Raises TooManyLocks."""
    check_count(held)
    data = codec.encode_fields([session, [_fields(lock) for lock in held]])
    if len(data) > RECORD_BYTES_MAX:
        raise TooManyLocks("the locks on one inode do not fit in their record")
    return data


def encode_sole(session: int) -> bytes:
    """That a session decides alone."""
    return codec.encode_fields([session, [], True])


def decode_held(data: bytes) -> Holding:
    """Raises CorruptRecord, UnsupportedFormat."""
    fields = codec.decode_fields(data)
    try:
        session, held, *sole = fields
        return Holding(session, tuple(_lock(session, each) for each in held), sole == [True])
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"a record of held locks does not decode: {exc}") from exc


def encode_waiting(lock: Lock, arrival: Arrival | None = None) -> bytes:
    """A request. `arrival`: if it is not the revision that makes its key."""
    return codec.encode_fields([lock.session, _fields(lock), *(arrival or ())])


def decode_waiting(data: bytes) -> tuple[Lock, Arrival | None]:
    """Raises CorruptRecord, UnsupportedFormat."""
    fields = codec.decode_fields(data)
    try:
        session, wanted, *arrival = fields
        return _lock(session, wanted), Arrival(*arrival) if arrival else None
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"a record of a waiting lock does not decode: {exc}") from exc


def _fields(lock: Lock) -> list[int]:
    return [lock.owner, lock.start, lock.end, int(lock.type), lock.pid]


def _lock(session: int, fields: Sequence[int]) -> Lock:
    owner, start, end, type_, pid = fields
    return Lock(session, owner, start, end, LockType(type_), pid)
