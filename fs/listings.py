"""Listings that the kernel may cache, and what a position in one of them means.

The kernel keeps one listing of a directory and lets any handle add to it whose position is where it ends. So positions
carry the number of the listing that they are of: entries of two listings never become one, and a handle that has read
half of a listing from the kernel's cache can go on after the same name when that cache is gone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

NAMES_MAX = 400_000
"""Names that are remembered over all listings, each of which counts as one more; those that were made first are
forgotten first."""
INDEX_BITS = 32
NUMBER_MAX = (1 << 30) - 1


def position(number: int, index: int) -> int:
    """The position after `index` entries, "." and ".." counted, of a listing; number 0: of one without a number."""
    return number << INDEX_BITS | index


def split(at: int) -> tuple[int, int]:
    """Number and index of a position."""
    return at >> INDEX_BITS, at & ((1 << INDEX_BITS) - 1)


@dataclass(frozen=True, slots=True)
class Listing:
    """All names of a directory, in byte order, as one READDIR found them."""

    number: int
    directory: int
    names: tuple[bytes, ...]


class Listings:
    """The listings of one mount that were numbered last."""

    def __init__(self) -> None:
        self._numbered: OrderedDict[int, Listing] = OrderedDict()
        self._newest: dict[int, Listing] = {}
        self._names = 0
        self._last = 0

    def add(self, directory: int, names: tuple[bytes, ...]) -> Listing:
        """Give a listing its number. It is the directory's newest now."""
        self._last = self._last % NUMBER_MAX + 1
        made = self._numbered[self._last] = self._newest[directory] = Listing(self._last, directory, names)
        self._names += 1 + len(names)
        while self._names > NAMES_MAX and len(self._numbered) > 1:
            _, oldest = self._numbered.popitem(last=False)
            self._names -= 1 + len(oldest.names)
            if self._newest.get(oldest.directory) is oldest:
                del self._newest[oldest.directory]
        return made

    def newest(self, directory: int) -> Listing | None:
        """The listing of a directory that was numbered last, if it is remembered."""
        return self._newest.get(directory)

    def find(self, number: int) -> Listing | None:
        """The listing of this number, if it is remembered."""
        return self._numbered.get(number)
