"""Guesses whether a new file will be small, from the files that were last written in its directory.

A small file is cheaper to write through the daemon, which keeps it in memory; a large one by passthrough.
"""

from __future__ import annotations

from collections import OrderedDict

SMALL_BYTES = 1 << 20
RUN = 3
"""So many small files in a row make the next one probably small."""
DIRECTORIES_MAX = 4096


class SizeGuess:
    """That of one mount. Remembers the directories that were last written to."""

    def __init__(self) -> None:
        self._small: OrderedDict[int, int] = OrderedDict()
        """Small files in a row, by directory."""

    def is_small(self, directory: int) -> bool:
        """Whether the next file there will probably be small."""
        return self._small.get(directory, 0) >= RUN

    def note(self, directory: int, size_bytes: int) -> None:
        """A file that was made there has been written and closed."""
        run = self._small.pop(directory, 0) + 1 if size_bytes < SMALL_BYTES else 0
        self._small[directory] = run
        if len(self._small) > DIRECTORIES_MAX:
            self._small.popitem(last=False)
