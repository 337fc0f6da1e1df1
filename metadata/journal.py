"""The journal: what each transaction did, in the order of revisions.

Every transaction of a session puts one record into one of the session's slots. The history of the slots, read in
revision order (a watch on `s/` from a revision), is the change log: position = revision, session and slot = key
(`changes/` reads it). A record says enough to rebuild names, attributes and the identity of bodies from the log alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    """Nothing of a directory and all below it changes from here on, up to its UNSEAL; only its policy may."""
    UNSEAL = 18
    """It may change again. Also of a tree whose sealing had only begun: then no SEAL comes before it."""
    POLICY = 19
    """A directory got a site policy, or lost its own."""


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
    """When; also the inode's new ctime (but for SEAL, UNSEAL, POLICY), and mtime and ctime of the directories whose
    names have changed."""
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
    """A symlink's target, the attribute's value, or the policy as it is stored (`policy.py`); empty: it was cleared."""
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
    return any(change[0] in NAMESPACE_KINDS for change in fields[3])


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
def _places(mask: int) -> tuple[int, ...]:
    if mask >> len(_DEFAULTS):
        raise ValueError("a change of a newer version")
    return tuple(place for place, bit in enumerate(_BITS) if mask & bit)


def _change(fields: Sequence[Any], base_ns: int) -> Change:
    kind = _KINDS.get(fields[0])
    if kind is None:
        raise ValueError(f"a change of kind {fields[0]!r}")
    if len(fields) == 1:
        return Change(kind)
    values = list(_DEFAULTS)
    for place, value in zip(_places(fields[1]), fields[2:], strict=True):
        values[place] = value
    values[_TIME] += base_ns
    return Change(kind, *values)
