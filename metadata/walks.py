"""Which directories are being walked, and so which of their subdirectories to read ahead."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

WALKS_MAX = 64
SUBDIRECTORIES_MAX = 4096
"""Subdirectories that are remembered of one directory; of those after them each is read for itself."""


@dataclass(slots=True)
class _Walk:
    order: tuple[int, ...]
    place: dict[int, int]
    listed: set[int] = field(default_factory=set)


class Walks:
    """The directories that were listed last, each with its subdirectories in the order of the listing."""

    def __init__(self) -> None:
        self._walks: OrderedDict[int, _Walk] = OrderedDict()

    def listed(self, directory: int, subdirectories: Sequence[int]) -> None:
        """A directory's listing was read, from its beginning."""
        order = tuple(subdirectories[:SUBDIRECTORIES_MAX])
        known = self._walks.get(directory)
        if known is not None and known.order == order:
            self._walks.move_to_end(directory)
        elif len(order) > 1:
            self._walks[directory] = _Walk(order, {ino: at for at, ino in enumerate(order)})
            self._walks.move_to_end(directory)
            if len(self._walks) > WALKS_MAX:
                self._walks.popitem(last=False)
        else:
            self._walks.pop(directory, None)

    def after(self, parent: int, ino: int, most: int) -> Iterator[int]:
        """Up to `most` subdirectories that the listing of `parent` had after `ino`; none if it was not listed."""
        walk = self._walks.get(parent)
        at = walk.place.get(ino) if walk is not None else None
        return iter(()) if walk is None or at is None else islice(walk.order, at + 1, at + 1 + most)

    def goes_on(self, parent: int, ino: int) -> bool:
        """A subdirectory of `parent` is about to be listed: whether another one was before it."""
        walk = self._walks.get(parent)
        if walk is None or ino not in walk.place:
            return False
        walk.listed.add(ino)
        return len(walk.listed) > 1
