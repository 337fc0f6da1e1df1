"""What a consumer of the change log gets, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from apollofs.metadata import codec, journal
from apollofs.metadata.changes.position import Position
from apollofs.metadata.journal import Change
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Event


class ChangeRecord(NamedTuple):
    """One change. `path` and `old_path` (of a rename, before) start at the volume's root and are as of that time; None
    where they are not known: the change was made by number to a file with several names, or the log does not reach back
    to the directory's making and etcd has forgotten it."""

    position: Position
    session: int
    site: int
    """Id of the site where the mount was; 0: made with the volume."""
    change: Change
    path: bytes | None
    old_path: bytes | None


class SlotEntry(NamedTuple):
    """The journal record of one transaction, as it is stored: `fields` is what `journal.decoded` takes."""

    revision: int
    session: int
    fields: list[Any]


def entries_of(keys: Keys, events: Iterable[Event]) -> Iterator[SlotEntry]:
    """The transactions in a watch's events that have changed the namespace. Raises CorruptRecord, UnsupportedFormat."""
    for event in events:
        if not event.deleted:
            fields = codec.decode_fields(event.kv.value)
            if journal.is_of_namespace(fields):
                yield SlotEntry(event.kv.mod_revision, keys.parse_slot(event.kv.key), fields)
