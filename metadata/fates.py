"""What became of the bodies that a session has sent: for who was interrupted, or got no answer, and must know."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.journal import Kind, SlotRecord

FATES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of the last commit of a body that was sent for an inode."""

    applied: bool
    size_bytes: int
    """Of the file with it."""


class Fates:
    """Of one session, by inode; bounded, the oldest leave first."""

    def __init__(self) -> None:
        self._known: dict[int, Fate] = {}

    def begin(self, ino: int) -> None:
        """A body is about to be committed, and not sent yet: `of` is about that from now on."""
        self._note(ino, Fate(applied=False, size_bytes=0))

    def sent(self, record: SlotRecord) -> None:
        """A transaction with this record is under way: what becomes of its bodies is not known."""
        for change in record.changes:
            if change.kind is Kind.COMMIT:
                self._known.pop(change.ino, None)

    def tell(self, record: SlotRecord, *, applied: bool) -> None:
        """It was applied, or never will be."""
        for change in record.changes:
            if change.kind is Kind.COMMIT:
                self._note(change.ino, Fate(applied, change.size_bytes))

    def of(self, ino: int) -> Fate | None:
        """As the journal tells; None: its outcome is unknown (`Session.in_doubt`), or it is so long ago that it was
        forgotten."""
        return self._known.get(ino)

    def _note(self, ino: int, fate: Fate) -> None:
        self._known.pop(ino, None)
        self._known[ino] = fate
        if len(self._known) > FATES_MAX:
            del self._known[next(iter(self._known))]
