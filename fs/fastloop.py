"""Reads request after request without a round of trio's scheduler for each.

pyfuse3 waits in epoll before every read, which is most of what a request costs.  With the descriptor non-blocking,
this replaces pyfuse3's private `_wait_fuse_readable`: try to read first, and wait only when the queue is dry.

Rules:
- One worker watches the descriptor; the others that have nothing to do are parked, last in first out, so that few of
  pyfuse3's 1 MiB buffers are ever touched.  Whoever stops watching wakes one parked worker to watch in its place.
- Other tasks run at least every `REQUESTS_MAX` requests and every `SLICE_S`.
- pyfuse3 cannot see the parked workers and so starts all of `max_tasks` at once: choose that number for concurrency.
- When the session has ended everybody is woken and told so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from time import monotonic

import trio
from trio.lowlevel import cancel_shielded_checkpoint, wait_readable

from apollofs.fs.wire_load import hook, pyfuse3

log = logging.getLogger(__name__)

REQUESTS_MAX = 64
SLICE_S = 0.002
PRIVATE_NAME = "_wait_fuse_readable"

WaitReadable = Callable[[], Awaitable[bool]]


class FastLoop:
    """The wait of one session's workers.  `install` makes one."""

    def __init__(self, fd: int, original: WaitReadable) -> None:
        self._fd = fd
        self._original = original
        self._parked: list[trio.lowlevel.Task] = []
        self._watched = False
        self._requests = 0
        self._slice_end = 0.0
        self.waits = 0
        """How often a worker had to wait in epoll."""

    async def wait_fuse_readable(self) -> bool:
        """True: try to read.  False: the session has ended.  What pyfuse3 awaits before each read."""
        if not hook.dry():
            self._requests += 1
            if self._requests < REQUESTS_MAX and monotonic() < self._slice_end:
                return True
            await cancel_shielded_checkpoint()
            self._begin_slice()
            return True
        while self._watched:
            await self._park()
        if hook.exited():
            self._wake_all()
            return False
        return await self._watch()

    def uninstall(self) -> None:
        """Give pyfuse3 its own function back; after pyfuse3.main() has returned."""
        setattr(pyfuse3, PRIVATE_NAME, self._original)

    def _begin_slice(self) -> None:
        self._requests = 0
        self._slice_end = monotonic() + SLICE_S

    async def _watch(self) -> bool:
        self._watched = True
        self.waits += 1
        try:
            await wait_readable(self._fd)
        except trio.ClosedResourceError:  # pyfuse3.terminate()
            self._wake_all()
            return False
        finally:
            self._watched = False
            if self._parked:
                trio.lowlevel.reschedule(self._parked.pop())
        self._begin_slice()
        return True

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._parked.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake_all(self) -> None:
        while self._parked:
            trio.lowlevel.reschedule(self._parked.pop())


def install(fd: int) -> FastLoop | None:
    """Make pyfuse3 read from `fd` (`Wire.fd`) this way; after pyfuse3.init(), before pyfuse3.main().

    None, with a warning in the log, when this pyfuse3 lacks the private function: everything works then, slower.
    """
    original: WaitReadable | None = getattr(pyfuse3, PRIVATE_NAME, None)
    if original is None:
        log.warning(
            "pyfuse3 %s has no %s: requests are served without the fast loop", pyfuse3.__version__, PRIVATE_NAME
        )
        return None
    os.set_blocking(fd, False)
    loop = FastLoop(fd, original)
    setattr(pyfuse3, PRIVATE_NAME, loop.wait_fuse_readable)
    return loop
