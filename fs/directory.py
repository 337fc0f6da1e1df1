"""Directory handles: a listing as one snapshot, read page by page, with positions that stay valid."""

from __future__ import annotations

import stat
from bisect import bisect_right
from dataclasses import dataclass, field

from apollofs.fs.listings import Listing
from apollofs.metadata.errors import Compacted
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, DirectoryPage
from apollofs.metadata.volume import Volume

PAGE_ENTRIES = 1000
DOTS = 2
"""Positions that "." and ".." take up."""


@dataclass(slots=True)
class DirectoryHandle:
    """One open directory. A position is the number of entries before it, "." and ".." included.

    All pages are one snapshot, taken when position 0 is read. Memory: one page, and a name for each page passed.
    """

    ino: int
    losses: int = 0
    """`Volume.losses` as last reported here."""
    cached: bool = False
    """Whether the kernel puts what it is told into its cache."""
    listing: Listing | None = None
    """What the positions are of, if that has a number."""
    epoch: int = 0
    """When it was handed out, as `KernelCache` counts; 0: the kernel must not keep it."""
    revision: int = 0
    starts: list[int] = field(default_factory=list)
    """Where each page that was read begins, counted without the dots."""
    afters: list[bytes] = field(default_factory=list)
    """The name before each page."""
    page: tuple[DirectoryEntry, ...] = ()
    page_at: int = 0
    more: bool = False
    parent: int = ROOT_INO
    """What ".." is; for whoever reads position 0 to say."""

    async def read(self, volume: Volume, position: int) -> list[DirectoryEntry]:
        """Entries from `position` on, to the end of their page; none at the end of the directory."""
        await self._seek(volume, max(position - DOTS, 0))
        return self.shown(position)

    def shown(self, position: int) -> list[DirectoryEntry]:
        """As `read`, of the present page."""
        found: list[DirectoryEntry] = []
        if position < DOTS:
            dots = (DirectoryEntry(b".", self.ino, stat.S_IFDIR), DirectoryEntry(b"..", self.parent, stat.S_IFDIR))
            found += dots[position:]
        index = max(position - DOTS, 0)
        found += self.page[index - self.page_at :] if index >= self.page_at else ()
        return found

    def begin(self, found: DirectoryPage) -> None:
        """A new snapshot, of which this is the first page."""
        self.starts, self.afters = [0], [b""]
        self._show(found, 0)

    def resume(self, position: int, after: bytes) -> None:
        """Go on at `position`, with what follows a name in the newest state."""
        self.starts, self.afters, self.page, self.page_at = [max(position - DOTS, 0)], [after], (), -1
        self.revision = 0

    async def _seek(self, volume: Volume, index: int) -> None:
        """Make the page that has `index` the present one, or the last one if there is none."""
        if not self.starts or index < self.starts[0]:
            self.begin(await volume.readdir(self.ino, b"", PAGE_ENTRIES))
        number = bisect_right(self.starts, index) - 1
        if self.starts[number] != self.page_at:
            await self._load(volume, number)
        while self.more and index >= self.page_at + len(self.page):
            number += 1
            if number == len(self.starts):
                self.starts.append(self.page_at + len(self.page))
                self.afters.append(self.page[-1].name)
            await self._load(volume, number)

    async def _load(self, volume: Volume, number: int) -> None:
        try:
            found = await volume.readdir(self.ino, self.afters[number], PAGE_ENTRIES, self.revision)
        except Compacted:
            # the snapshot is gone: go on after the same name in the newest state, where later pages begin elsewhere
            found = await volume.readdir(self.ino, self.afters[number], PAGE_ENTRIES)
            del self.starts[number + 1 :], self.afters[number + 1 :]
        self._show(found, number)

    def _show(self, found: DirectoryPage, number: int) -> None:
        self.revision = found.revision
        self.page, self.page_at, self.more = found.entries, self.starts[number], found.more
