"""What the daemon does when its lease is no longer proven: the kernel's pages of open files go.

Names and attributes run out in the kernel by themselves then. Pages don't: a mapping would go on with them, though
others may change the file from now on. A daemon that is itself stopped can't do this; that is what `guard.py` is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import trio

from apollofs.metadata.session import boot_time

log = logging.getLogger(__name__)
THREADS_MAX = 64


class LeaseEnd:
    """One mount's. `inodes` tells which files are open, `drop` has the kernel drop one's pages, and may wait."""

    def __init__(self, inodes: Callable[[], Collection[int]], drop: Callable[[int], object]) -> None:
        self._inodes = inodes
        self._drop = drop
        self._until = 0.0
        self._moved = trio.Event()
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self.count = 0
        """How often it has come to that."""

    def prove(self, until: float) -> None:
        """The lease is proven until then (`boot_time`)."""
        self._until = until
        self._moved.set()
        self._moved = trio.Event()

    async def serve(self) -> None:
        """Watch until cancelled. Pages that wait for a READ are waited for by nobody else."""
        async with trio.open_nursery() as nursery:
            while True:
                moved = self._moved
                with trio.move_on_after(max(0.0, self._until - boot_time())):
                    await moved.wait()
                    continue
                self.count += 1
                inodes = self._inodes()
                log.info("the lease is not proven any more: the pages of %d open files are dropped", len(inodes))
                for ino in inodes:
                    nursery.start_soon(self._drop_one, ino)
                await moved.wait()

    async def _drop_one(self, ino: int) -> None:
        try:
            await trio.to_thread.run_sync(self._drop, ino, abandon_on_cancel=True, limiter=self._threads)
        except OSError as exc:
            log.info("the kernel takes no notifications any more: %s", exc)
