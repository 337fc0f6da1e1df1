"""The kernel's references to inodes: counted, and bounded.

Something is remembered here of every inode that the kernel knows: where it is, what it was told, its attributes as last
seen. By itself the kernel lets go of inodes only when it lacks memory, whatever that costs us. So where it knows more
than INODES_MAX it is asked to drop those that it was told of first, as far as nobody uses them (Linux 6.18; older
kernels can't be asked, and there our memory follows theirs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice

import trio

log = logging.getLogger(__name__)
INODES_MAX = 1_000_000
SPARE = 8
"""One of so many is dropped beyond what is too much."""
PRUNED_AT_ONCE = 512
PAUSE_S = 1.0
"""Between two askings: the kernel's FORGETs come some time after it was asked."""


class References:
    """Of one mount's kernel; the root, which it always knows, is not among them."""

    def __init__(self, forgotten: Callable[[int], None], inodes_max: int = INODES_MAX) -> None:
        """`forgotten` is told of each inode that the kernel knows no more."""
        self._forgotten = forgotten
        self._inodes_max = inodes_max
        self._counts: dict[int, int] = {}
        self._crowded = trio.Event()

    def __contains__(self, ino: int) -> bool:
        return ino in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, ino: int) -> None:
        """A reply hands the kernel one more reference."""
        self._counts[ino] = self._counts.get(ino, 0) + 1
        if len(self._counts) > self._inodes_max:
            self._crowded.set()

    def release(self, ino: int, count: int) -> None:
        """FORGET."""
        left = self._counts.get(ino, 0) - count
        if left > 0:
            self._counts[ino] = left
        else:
            self._counts.pop(ino, None)
            self._forgotten(ino)

    async def keep_bounded(self, prune: Callable[[Sequence[int]], bool]) -> None:
        """Have the kernel drop what is too much, until cancelled. `prune` may wait, and runs in a thread; False: the
        kernel can't."""
        while True:
            await self._crowded.wait()
            self._crowded = trio.Event()
            oldest = self._oldest(len(self._counts) - self._inodes_max + self._inodes_max // SPARE)
            for first in range(0, len(oldest), PRUNED_AT_ONCE):
                batch = oldest[first : first + PRUNED_AT_ONCE]
                try:
                    if not await trio.to_thread.run_sync(prune, batch, abandon_on_cancel=True):
                        log.info("this kernel can't be asked to drop inodes")
                        return
                except OSError as exc:
                    log.info("the kernel drops no inodes: %s", exc)
                    return
            await trio.sleep(PAUSE_S)

    def _oldest(self, count: int) -> list[int]:
        """They are the newest then: what stays, as it is in use, is not tried again at once."""
        found = list(islice(self._counts, max(0, count)))
        for ino in found:
            self._counts[ino] = self._counts.pop(ino)
        return found
