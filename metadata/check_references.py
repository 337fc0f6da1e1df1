"""Which inodes refer to which blobs, as the whole-namespace checker sees them.

Rules
1. A blob without any `r/<blob>/<ino>` is private: one living inode at most refers to it.
2. Of a blob with such keys, each living inode that refers to it has one.
3. A private blob that a tombstone says was dropped is referred to by nobody: it is about to be deleted.
4. A key whose inode does not refer to the blob is there only as long as a tombstone says that it did: the collector
   takes both away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class BlobReferences:
    """Fed with the keys of table r, then the living inodes' extents, then the tombstones. About 200 bytes a key, and
    100 a private blob."""

    _accounted: dict[tuple[int, int], bool] = field(default_factory=dict)
    """By (blob, ino), for each key: whether the inode, or a tombstone of it, refers to the blob."""
    _shared: set[int] = field(default_factory=set)
    _owners: dict[int, int] = field(default_factory=dict)
    """Of private blobs."""

    def add(self, blob: int, ino: int) -> None:
        """There is a key `r/<blob>/<ino>`."""
        self._shared.add(blob)
        self._accounted[blob, ino] = False

    def referred(self, ino: int, blobs: Iterable[int]) -> Iterator[str]:
        """A living inode refers to `blobs`; what is wrong with that."""
        for blob in blobs:
            if blob in self._shared:
                if (blob, ino) not in self._accounted:
                    yield f"it refers to the shared blob {blob:#x} without a reference"
                self._accounted[blob, ino] = True
            elif self._owners.setdefault(blob, ino) != ino:
                yield f"it and inode {self._owners[blob]:#x} refer to blob {blob:#x}, which is private"

    def dropped(self, ino: int, blobs: Iterable[int]) -> Iterator[str]:
        """A tombstone says that an inode has dropped `blobs`, or has died with them; what is wrong with that."""
        for blob in blobs:
            if (blob, ino) in self._accounted:
                self._accounted[blob, ino] = True
            elif blob in self._owners and blob not in self._shared:
                yield f"it has dropped blob {blob:#x}, to which inode {self._owners[blob]:#x} refers"

    def left_over(self, buried: set[int]) -> list[tuple[int, int]]:
        """(blob, ino) of keys that nothing accounts for; those of buried inodes are their tombstones' to take away."""
        return [key for key, known in self._accounted.items() if not known and key[1] not in buried]
