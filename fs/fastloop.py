"""Reads request after request without a round of trio's scheduler for each.

pyfuse3 waits in epoll before every read, which is most of what a request costs.  With the descriptor non-blocking,
this replaces pyfuse3's private `_wait_fuse_readable`: try to read first, and wait only when the queue is dry.

Rules:
- One worker watches the descriptor; the others that have nothing to do are parked, last in first out, so that few of
  pyfuse3's 1 MiB buffers are ever touched.  Whoever stops watching wakes one parked worker to watch in its place.
- Other tasks run at least every `REQUESTS_MAX` requests and every `SLICE_S`.
- pyfuse3 cannot see the parked workers and would start all that it may at once, so it starts one, `serve` each other
  when nobody is parked to take over the watch.  More than `PARKED_MAX` are not kept: each has a buffer.
- A request that waits keeps its worker.  With all `workers_max` waiting nobody would read, not even the INTERRUPT that
  lets a killed process go; so if nothing was read for `STUCK_S`, up to `RESERVE` more read on, and what may be
  interrupted must not wait there: it is refused, until the first of the others is back.
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
PARKED_MAX = 64
STUCK_S = 0.5
RESERVE = 256
PRIVATE_NAME = "_wait_fuse_readable"
PRIVATE_WORKER = "_session_loop"
_NO_MORE = -(2**31)
"""For pyfuse3: a number of workers at which it starts none by itself."""

WaitReadable = Callable[[], Awaitable[bool]]


class FastLoop:
    """The wait of one session's workers.  `install` makes one."""

    def __init__(self, fd: int, original: WaitReadable) -> None:
        self._fd = fd
        self._original = original
        self._parked: list[trio.lowlevel.Task] = []
        self._watched = False
        self._awaited = False
        """A worker was started to watch: somebody must, before anybody reads on."""
        self._workers: trio.Nursery | None = None
        self._count = 0
        self._workers_max = 0
        self._first: trio.lowlevel.Task | None = None
        self._crowded = False
        self._requests = 0
        self._slice_end = 0.0
        self._on_crowd: Callable[[bool], None] = lambda _: None
        self.waits = 0
        """How often a worker had to wait in epoll."""

    async def serve(self, workers_max: int, on_crowd: Callable[[bool], None]) -> None:
        """Answer requests until the session ends, up to `workers_max` at once; in place of pyfuse3.main().

        `on_crowd(True)`: so many wait that no further one may, until `on_crowd(False)`.
        """
        self._workers_max, self._on_crowd = workers_max, on_crowd
        self._count, self._awaited = 1, True
        async with trio.open_nursery() as minding:
            minding.start_soon(self._mind)
            async with trio.open_nursery() as self._workers:
                await pyfuse3.main(1, _NO_MORE)
            self._workers = None
            minding.cancel_scope.cancel()

    async def wait_fuse_readable(self) -> bool:
        """True: try to read.  False: this worker ends.  What pyfuse3 awaits before each read."""
        if not (self._awaited or self._crowded or hook.dry()):
            self._requests += 1
            if self._requests < REQUESTS_MAX and monotonic() < self._slice_end:
                return True
            await cancel_shielded_checkpoint()
            self._begin_slice()
            return True
        while self._watched:
            if self._retires():
                return False
            await self._park()
        if hook.exited():
            self._wake_all()
            return False
        if self._first is None:
            self._first = trio.lowlevel.current_task()
        return await self._watch()

    def uninstall(self) -> None:
        """Give pyfuse3 its own function back; after pyfuse3.main() has returned."""
        setattr(pyfuse3, PRIVATE_NAME, self._original)

    def _begin_slice(self) -> None:
        self._requests = 0
        self._slice_end = monotonic() + SLICE_S

    async def _watch(self) -> bool:
        self._watched = True
        self._awaited = False
        self.waits += 1
        try:
            await wait_readable(self._fd)
        except trio.ClosedResourceError:  # pyfuse3.terminate()
            self._wake_all()
            return False
        finally:
            self._watched = False
            self._hand_over()
        self._begin_slice()
        return True

    def _hand_over(self) -> None:
        """Have another worker watch; if there is none, and may be none, nobody does until one is back."""
        if self._parked:
            trio.lowlevel.reschedule(self._parked.pop())
        elif self._workers is not None and self._count < self._workers_max + (RESERVE if self._crowded else 0):
            self._count += 1
            self._awaited = True
            work = getattr(pyfuse3, PRIVATE_WORKER)
            self._workers.start_soon(work, self._workers, 1, _NO_MORE)

    def _retires(self) -> bool:
        """Whether the worker that has nothing to do is one too many.  Never pyfuse3's own: main() ends with it."""
        if self._workers is None:
            return False
        task = trio.lowlevel.current_task()
        if self._first is task or (self._count <= self._workers_max and len(self._parked) < PARKED_MAX):
            return False
        self._count -= 1
        if self._crowded and self._count <= self._workers_max:
            self._crowded = False
            self._on_crowd(False)
        return True

    async def _mind(self) -> None:
        """Let the reserve in when nobody has read for a while."""
        read_before = -1
        while not hook.exited():
            await trio.sleep(STUCK_S)
            if self._watched or self._awaited or self._parked:
                continue
            read = sum(hook.state()["counts"].values())
            if read == read_before and not hook.exited():
                if not self._crowded:
                    log.warning("%d requests wait, as many as may: what would wait as well is refused", self._count)
                    self._crowded = True
                    self._on_crowd(True)
                self._hand_over()
            read_before = read

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

    None, with a warning in the log, when this pyfuse3 lacks a private function: everything works then, slower.
    """
    for name in (PRIVATE_NAME, PRIVATE_WORKER):
        if not hasattr(pyfuse3, name):
            log.warning("pyfuse3 %s has no %s: requests are served without the fast loop", pyfuse3.__version__, name)
            return None
    original: WaitReadable = getattr(pyfuse3, PRIVATE_NAME)
    os.set_blocking(fd, False)
    loop = FastLoop(fd, original)
    setattr(pyfuse3, PRIVATE_NAME, loop.wait_fuse_readable)
    return loop
