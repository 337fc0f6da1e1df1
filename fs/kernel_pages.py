"""Which files have pages in the kernel, and which version of their bodies these show. No I/O.

Rules
1. The kernel asks for a file's attributes before each read(2), unless it was given them for a time, which is the
   lease's; if size or mtime are others then, it drops the pages by itself (AUTO_INVAL_DATA). That holds under a daemon
   that is stopped, too. Where neither tells of a new body, the pages are dropped before the reply (`settle`). Only
   there: after that the kernel does not believe the reply, and would go on with the size that it knows.
2. A mapping asks for nothing. Its pages go when the group of the file does, as attributes do; what it asks for then
   is the newest body (`asks`).
3. Pages outlive the close of a file. At the next open they are kept only if all are of the version that is opened and
   nothing was written since they were last dropped: what was written here the kernel puts into them by itself.
4. Dropping pages waits for READs of them that are in flight, the first one of a file too (`expect`), and these wait
   for nobody's delegation. A READ that is answered later is of the version that it says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

Shown: TypeAlias = tuple[int, int]
"""Size in bytes and mtime in ns, as processes here see them."""


SHOWN_MAX = 8


class PageTable(Protocol):
    """Told which inodes may have pages in the kernel: whoever drops them in the daemon's place."""

    def add(self, ino: int) -> None: ...
    def remove(self, ino: int) -> None: ...


class NoPageTable:
    """Nobody wants to know."""

    def add(self, ino: int) -> None:
        pass

    def remove(self, ino: int) -> None:
        pass


@dataclass(slots=True)
class _Pages:
    shown: set[Shown] = field(default_factory=set)
    """Of the bodies that were read since then."""
    version: int = 0
    """body_version of what was read since they were last dropped; 0: nothing was."""
    mixed: bool = False
    """Some are, or may be, of another version."""
    dropping: int = 0
    """How many drops are under way: what was there before may be there still."""
    written: bool = False
    """Something was written, so that not all came from READs."""
    asks: int = 0
    """The number of the recall since which the base that is known may be old; 0: it is not."""

    def reset(self) -> None:
        self.shown.clear()
        self.version, self.mixed, self.written = 0, False, False


class KernelPages:
    """Those of one mount. As many as the kernel knows files with pages."""

    def __init__(self, table: PageTable | None = None) -> None:
        self._table = table if table is not None else NoPageTable()
        self._files: dict[int, _Pages] = {}
        self.kept = 0
        """Opens at which pages were kept."""
        self.drops = 0
        self.recalls = 0
        """How often pages of a file went with their group: what was asked for before may be old."""

    def __contains__(self, ino: int) -> bool:
        return ino in self._files

    def __len__(self) -> int:
        return len(self._files)

    def all(self) -> list[int]:
        """The inodes concerned."""
        return list(self._files)

    def _of(self, ino: int) -> _Pages:
        pages = self._files.get(ino)
        if pages is None:
            pages = self._files[ino] = _Pages()
            self._table.add(ino)
        return pages

    def expect(self, ino: int) -> None:
        """The kernel is about to have pages of a file: what is dropped from now on includes them."""
        self._of(ino)

    def read(self, ino: int, version: int, shown: Shown) -> None:
        """Bytes of a version of the body are about to be handed to the kernel."""
        pages = self._of(ino)
        pages.shown.add(shown)
        if len(pages.shown) > SHOWN_MAX:
            pages.shown = {shown}
        pages.mixed |= pages.version not in (0, version)
        pages.version = version

    def written(self, ino: int) -> None:
        """Bytes were written, or the file was cut: the kernel changes its pages by itself."""
        self._of(ino).written = True

    def committed(self, ino: int, before: int, after: int) -> None:
        """What was written has been committed, and nothing else came in between if the versions follow each other."""
        pages = self._files.get(ino)
        if pages is not None and pages.version == before and after == before + 1:
            pages.version = after

    def opened(self, ino: int, version: int) -> bool:
        """A file is opened, as of a version of its body: whether the pages are kept. If not, the kernel drops them."""
        pages = self._files.get(ino)
        if pages is None:
            return False
        if pages.version == version and not (pages.mixed or pages.written or pages.dropping):
            self.kept += 1
            return True
        pages.reset()
        return False

    def outdated(self, ino: int, version: int) -> bool:
        """Whether the kernel may have pages of another version than this."""
        pages = self._files.get(ino)
        return pages is not None and (bool(pages.mixed or pages.dropping) or pages.version not in (0, version))

    def settle(self, ino: int, version: int, shown: Shown) -> bool:
        """Attributes of a version of the body are about to be replied. Whether outdated pages must be dropped before;
        if not, the kernel does it when it takes in the reply."""
        if not self.outdated(ino, version):
            return False
        pages = self._files[ino]
        if shown in pages.shown and all(size == shown[0] for size, _ in pages.shown):
            return True
        pages.reset()
        return False

    def asks(self, ino: int) -> bool:
        """Whether the next READ must look for a newer body first."""
        pages = self._files.get(ino)
        return pages is not None and pages.asks > 0

    def refreshed(self, ino: int, since: int) -> None:
        """The newest body was looked for, when there had been so many `recalls`."""
        pages = self._files.get(ino)
        if pages is not None and pages.asks <= since:
            pages.asks = 0

    def spoil(self, ino: int) -> None:
        """They may be anything: drop them before attributes are given."""
        pages = self._files.get(ino)
        if pages is not None:
            pages.mixed = True

    def begin_drop(self, ino: int, *, recalled: bool) -> None:
        """They are about to be dropped; `recalled`: with their group. `end_drop` must follow."""
        pages = self._files.get(ino)
        if pages is not None:
            self.drops += 1
            # what they showed stays: if this is not done, they may be there still
            pages.version, pages.mixed, pages.written = 0, False, False
            pages.dropping += 1
            if recalled:
                self.recalls += 1
                pages.asks = self.recalls

    def end_drop(self, ino: int, *, done: bool) -> None:
        """All that was there at `begin_drop` is gone, if it was `done`; what was read meanwhile may be there."""
        pages = self._files.get(ino)
        if pages is not None and pages.dropping:
            pages.dropping -= 1
            pages.mixed |= not done
            if done and not pages.version:
                pages.shown.clear()

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more."""
        if self._files.pop(ino, None) is not None:
            self._table.remove(ino)
