"""A segment of the archive: transactions of the log, compressed, with all that is needed to read it alone.

    [schema, "changes", crc32 of the rest, zlib of [first_revision, last_revision, directories, entries]]

`entries` are [revision - the one before, session, journal record] each; `directories` says of every directory that a
record in it names, and that the segment itself does not place, where it was when it was first named: so paths need no
other segment. What is inside is complete from `first_revision` to `last_revision`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from apollofs.metadata import codec
from apollofs.metadata.changes.record import SlotEntry
from apollofs.metadata.errors import CorruptRecord

LEVEL = 3
"""Of zlib: half the time of its default, a tenth larger."""
MAGIC = "changes"
Place: TypeAlias = tuple[int, bytes]
"""(parent, name) of a directory."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A decoded segment. A directory of which nobody knew where it was is not in `directories`."""

    first_revision: int
    last_revision: int
    directories: Mapping[int, Place]
    entries: Sequence[SlotEntry]


def pack(segment: Segment) -> bytes:
    entries, before = [], segment.first_revision
    for entry in segment.entries:
        entries.append([entry.revision - before, entry.session, entry.fields])
        before = entry.revision
    places = [[ino, parent, name] for ino, (parent, name) in segment.directories.items()]
    inner = codec.encode_fields([segment.first_revision, segment.last_revision, places, entries])
    packed = zlib.compress(inner, LEVEL)
    return codec.encode_fields([MAGIC, zlib.crc32(packed), packed])


def unpack(data: bytes) -> Segment:
    """Raises CorruptRecord, UnsupportedFormat."""
    try:
        magic, crc, packed = codec.decode_fields(data)
        if magic != MAGIC or zlib.crc32(packed) != crc:
            raise CorruptRecord("a segment of the change log is damaged")
        first, last, places, found = codec.decode_fields(zlib.decompress(packed))
        entries, revision = [], first
        for distance, session, fields in found:
            revision += distance
            entries.append(SlotEntry(revision, session, fields))
        return Segment(first, last, {ino: (parent, name) for ino, parent, name in places}, entries)
    except (ValueError, TypeError, zlib.error) as exc:
        raise CorruptRecord(f"a segment of the change log does not decode: {exc}") from exc
