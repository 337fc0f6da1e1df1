"""The checker's part on seals: what has a seal's number, and which directories lead to a sealed tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from apollofs.metadata.records import Inode, InodeFlag
from apollofs.metadata.seal_records import Phase, SealRecord


@dataclass(slots=True)
class SealsSeen:
    """Fed with all seals, then all inodes, then all names. What is wrong is a sentence."""

    seals: dict[int, SealRecord] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    """Inode -> the number that it has."""
    waypoints: set[int] = field(default_factory=set)

    def add(self, record: SealRecord) -> None:
        self.seals[record.number] = record

    def inode(self, inode: Inode) -> Iterator[str]:
        if inode.flags & InodeFlag.WAYPOINT:
            self.waypoints.add(inode.ino)
        if inode.seal:
            self.numbers[inode.ino] = inode.seal
            if inode.seal not in self.seals:
                yield f"it has the number of seal {inode.seal}, which does not stand"

    def name(self, parent: int, ino: int, *, is_dir: bool) -> Iterator[str]:
        """A name of `ino` in `parent`."""
        above, own = self.numbers.get(parent, 0), self.numbers.get(ino, 0)
        record = self.seals.get(above)
        if record is not None and record.phase in (Phase.SEALED, Phase.ENDING) and own != above:
            yield f"it is in a tree that seal {above} covers, but lacks its number"
        record = self.seals.get(own)
        if is_dir and record is not None and own != above and record.root != ino:
            yield f"it has the number of seal {own}, and its directory has not"

    def finish(self) -> Iterator[tuple[int, str]]:
        """(inode, sentence) of what only the whole can tell."""
        expected = {ino for record in self.seals.values() for ino, _ in record.path}
        for ino in sorted(expected - self.waypoints):
            yield ino, "a sealed tree lies below the directory, which does not say so"
        for ino in sorted(self.waypoints - expected):
            yield ino, "the directory says that a sealed tree lies below, and none does"
