"""A segment that is being gathered: transactions, and where the directories are that they name."""

from __future__ import annotations

from apollofs.metadata import journal
from apollofs.metadata.changes.directories import Directories, places
from apollofs.metadata.changes.record import SlotEntry
from apollofs.metadata.changes.segment import Place, Segment
from apollofs.metadata.journal import NAMESPACE_KINDS, Change
from apollofs.metadata.records import ROOT_INO

ENTRY_BYTES = 120
"""About what a transaction takes in memory beside its record."""


class Draft:
    """What is gathered from `first_revision` on. `directories` is the archiver's map; it moves along."""

    def __init__(self, directories: Directories, first_revision: int) -> None:
        self._directories = directories
        self.first_revision = first_revision
        self.through = first_revision - 1
        """Everything up to this revision is here."""
        self.entries: list[SlotEntry] = []
        self.changes = 0
        self.size_bytes = 0
        """In memory, about."""
        self.first_time_ns = 0
        self.last_time_ns = 0
        self._places: dict[int, Place] = {}
        self._placed: set[int] = {ROOT_INO}
        """Directories that are in `_places`, or that an entry here places, or that nobody knows."""

    async def add(self, entry: SlotEntry, size_bytes: int) -> None:
        """Take a transaction. Cancelled, it is not here, and must be given again. Raises as `Directories` does."""
        changes = [change for change in journal.decoded(entry.fields).changes if change.kind in NAMESPACE_KINDS]
        for change in changes:
            await self._note(change, entry.revision)
        self.entries.append(entry)
        self.changes += len(changes)
        self.size_bytes += size_bytes + ENTRY_BYTES
        self.through = entry.revision
        times = [change.time_ns for change in changes]
        self.first_time_ns = min(self.first_time_ns or times[0], *times)
        self.last_time_ns = max(self.last_time_ns, *times)

    def segment(self) -> Segment:
        """All of it."""
        return Segment(self.first_revision, self.through, self._places, self.entries)

    async def _note(self, change: Change, revision: int) -> None:
        for directory in (change.parent, change.old_parent):
            above = directory
            while above and above not in self._placed:
                place = await self._directories.place(above, revision)
                self._placed.add(above)
                if place is None:
                    break
                self._places[above] = place
                above = place[0]
        self._directories.apply(change)
        self._placed.update(places(change))
