"""The journal: what each transaction did, in the order of revisions.

Every transaction of a session puts one record into one of the session's slots. The history of the slots, read in
revision order (a watch on `s/` from a revision), is the change log: position = revision, session and slot = key.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.metadata import codec


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


@dataclass(frozen=True, slots=True)
class Change:
    """One operation. For RENAME and EXCHANGE `parent`, `name` are the new place, `old_*` the one before; `ino2` is what
    was replaced or exchanged, `nlink2` how many names that still has."""

    kind: Kind
    ino: int = 0
    parent: int = 0
    name: bytes = b""
    old_parent: int = 0
    old_name: bytes = b""
    size_bytes: int = 0
    mode: int = 0
    nlink: int = 0
    ino2: int = 0
    nlink2: int = 0

    def fields(self) -> list[int | bytes]:
        """Without trailing zeros."""
        fields: list[int | bytes] = [
            int(self.kind),
            self.ino,
            self.parent,
            self.name,
            self.old_parent,
            self.old_name,
            self.size_bytes,
            self.mode,
            self.nlink,
            self.ino2,
            self.nlink2,
        ]
        while not fields[-1]:
            fields.pop()
        return fields


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """Value of a slot: the changes of its last transaction. `sequence` is unique in the session."""

    sequence: int
    site: int
    time_ns: int
    changes: tuple[Change, ...]


def encode(record: SlotRecord) -> bytes:
    return codec.encode_fields(
        [record.sequence, record.site, record.time_ns, [change.fields() for change in record.changes]]
    )


def decode(data: bytes) -> SlotRecord:
    """Raises CorruptRecord, UnsupportedFormat."""
    sequence, site, time_ns, changes = codec.decode_fields(data)
    return SlotRecord(sequence, site, time_ns, tuple(_change(fields) for fields in changes))


def _change(fields: Sequence[int | bytes]) -> Change:
    kind, *rest = fields
    return Change(Kind(int(kind)), *rest)  # type: ignore[arg-type]  # stored in the order of the fields
