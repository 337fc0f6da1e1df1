"""The journal: what each transaction did, in the order of revisions.

Every transaction of a session puts one record into one of the session's slots. The history of the slots, read in
revision order (a watch on `s/` from a revision), is the change log: position = revision, session and slot = key
(`changes/` reads it). A record says enough to rebuild names, attributes and the identity of bodies from the log alone.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord


class Kind(enum.IntEnum):
    """What happened. Numbers are stored: never reuse one."""

    OPEN = 1
    """A slot came into being."""
    NOTHING = 2
    """A slot was taken out of doubt."""
    CREATE = 3
    """A file, node or symlink."""
    MKDIR = 4
    LINK = 5
    UNLINK = 6
    RMDIR = 7
    RENAME = 8
    EXCHANGE = 9
    SETATTR = 10
    COMMIT = 11
    """A body changed."""
    SETXATTR = 12
    REMOVEXATTR = 13
    LOCK = 14
    USAGE = 15
    RESTORE = 16
    """An unlinked file got a name again, with all that it had."""
    SEAL = 17
    """Nothing of a directory and all below it changes from here on, up to its UNSEAL; only its policies may."""
    UNSEAL = 18
    """It may change again. Also of a tree whose sealing had only begun: then no SEAL comes before it."""
    POLICY = 19
    """A directory got a site policy, or lost its own."""
    RETENTION = 20
    """A directory got a retention policy, or lost its own."""


NAMESPACE_KINDS = frozenset(Kind) - {Kind.OPEN, Kind.NOTHING, Kind.LOCK, Kind.USAGE}
"""Those that change what a user sees: the change log has these."""


class Change(NamedTuple):
    """One operation; what its kind does not set keeps its default.

    `parent`, `name` are where the inode is: the new place for RENAME and EXCHANGE (`old_*` is the one before); 0 for a
    file that has or had several names where the operation was by number. `mode`, `uid`, `gid`, `flags`, `size_bytes`,
    `body_version` are as they are after; CREATE and MKDIR have no flags yet. SETATTR has all of them.
    """

    kind: Kind
    ino: int = 0
    parent: int = 0
    name: bytes = b""
    time_ns: int = 0
    """When; also the inode's new ctime (but for SEAL, UNSEAL, POLICY, RETENTION), and mtime and ctime of the
    directories whose names have changed."""
    mode: int = 0
    size_bytes: int = 0
    nlink: int = 0
    uid: int = 0
    gid: int = 0
    body_version: int = 0
    """Which body the file has now."""
    mtime_offset_ns: int | None = None
    """The new mtime minus `time_ns`. None: for SETATTR not changed, for COMMIT `time_ns`."""
    atime_offset_ns: int | None = None
    flags: int = 0
    """IMMUTABLE and APPEND_ONLY of SETATTR."""
    old_parent: int = 0
    old_name: bytes = b""
    ino2: int = 0
    """What was replaced (RENAME) or exchanged."""
    nlink2: int = 0
    """How many names `ino2` still has."""
    rdev: int = 0
    attribute: bytes = b""
    """The name of the extended attribute."""
    value: bytes = b""
    """A symlink's target, the attribute's value, or the policy as it is stored (`policy.py`, `retention.py`); empty: it
    was cleared."""
    term_s: float = 0
    """Of SEAL."""


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """Value of a slot: the changes of its last transaction. `sequence` is unique in the session."""

    sequence: int
    site: int
    time_ns: int
    changes: tuple[Change, ...]


def encode(record: SlotRecord) -> bytes:
    changes = [_fields(change, record.time_ns) for change in record.changes]
    return codec.encode_fields([record.sequence, record.site, record.time_ns, changes])


def decode(data: bytes) -> SlotRecord:
    """Raises CorruptRecord, UnsupportedFormat."""
    return decoded(codec.decode_fields(data))


def decoded(fields: Sequence[Any]) -> SlotRecord:
    """A record of what `codec.decode_fields` gave. Raises CorruptRecord."""
    try:
        sequence, site, time_ns, changes = fields
        return SlotRecord(sequence, site, time_ns, tuple([_change(each, time_ns) for each in changes]))
    except (ValueError, TypeError, IndexError) as exc:
        raise CorruptRecord(f"a journal record does not decode: {exc}") from exc


def is_of_namespace(fields: Sequence[Any]) -> bool:
    """Whether a record that `codec.decode_fields` gave has a change that the log is about."""
    for change in fields[3]:  # noqa: SIM110  (a generator would take a tenth of the time of reading a record)
        if change[0] in NAMESPACE_KINDS:
            return True
    return False


# -- layout: the kind, and where there is more than that, a mask of the fields that follow; times are relative ---------

_DEFAULTS: tuple[Any, ...] = (0, 0, b"", 0, 0, 0, 0, 0, 0, 0, None, None, 0, 0, b"", 0, 0, 0, b"", b"", 0)
"""Of the fields after `kind`, in their order, which is stored."""
_BITS = tuple(1 << place for place in range(len(_DEFAULTS)))
_TIME = 3
_KINDS = {int(kind): kind for kind in Kind}


def _fields(change: Change, base_ns: int) -> list[int | float | bytes]:
    values: list[Any] = list(change[1:])
    values[_TIME] = change.time_ns and change.time_ns - base_ns
    mask, given = 0, list[int | float | bytes]()
    for bit, value, default in zip(_BITS, values, _DEFAULTS, strict=True):
        if value != default:
            mask |= bit
            given.append(value)
    return [int(change.kind), mask, *given] if mask else [int(change.kind)]


@lru_cache(maxsize=1024)
def _layout(mask: int) -> tuple[int, int, Callable[[Sequence[Any]], tuple[Any, ...]]]:
    """For changes with this mask: how many fields are stored, which of them is the time (-1: none), and what puts
    [kind, time, stored fields..., defaults...] in the order of `Change`."""
    if mask >> len(_DEFAULTS):
        raise ValueError("a change of a newer version")
    stored = [place for place, bit in enumerate(_BITS) if mask & bit]
    place_of = {place: 2 + at for at, place in enumerate(stored)} | {_TIME: 1}
    order = [place_of.get(place, 2 + len(stored) + place) for place in range(len(_DEFAULTS))]
    return len(stored) + 2, 2 + stored.index(_TIME) if _TIME in stored else -1, itemgetter(0, *order)


def _change(fields: list[Any], base_ns: int) -> Change:
    kind = _KINDS.get(fields[0])
    if kind is None:
        raise ValueError(f"a change of kind {fields[0]!r}")
    if len(fields) == 1:
        return Change(kind)
    size, time_at, in_order = _layout(fields[1])
    if len(fields) != size:
        raise ValueError(f"a change of {len(fields)} fields, not {size}")
    time_ns = base_ns if time_at < 0 else base_ns + fields[time_at]
    return tuple.__new__(Change, in_order([kind, time_ns, *fields[2:], *_DEFAULTS]))
