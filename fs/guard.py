"""The guard: a process beside a mount's daemon that drops the kernel's pages when the daemon, stopped, can't.

    python -m apollofs.fs.guard '{"fuse_fd": 5, "table_fd": 6, ...}'     # started by `guarding.py` only

Names and attributes run out in the kernel by themselves, with the lease; pages of open files know no timeout. So a
daemon that is stopped (SIGSTOP, a debugger) would leave them to be read after its lease has ended, when others may
have changed the files. The guard sees in shared memory (`page_table.py`) until when the lease is proven and which files
are open. When that runs out it drops their pages: who reads then asks the daemon, and waits for it.

Rules
1. It drops a little before the lease ends, so as to be done by then, and once more when it has ended. A daemon that
   renews its lease arms it again.
2. It reads no requests while the daemon lives: those are the daemon's, which answers them when it goes on.
3. Its descriptor keeps the connection alive. When the daemon has ended (its end of the pipe on standard input is
   closed) the guard refuses every request that waits with ENOTCONN, drops all pages a last time, and ends; the
   requests that the daemon had read were ended by the kernel, with its descriptor.
4. It never waits for the kernel itself: `page_dropper.py`.
5. Its descriptor is never polled: the kernel would wake it for every request of the mount.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass

from apollofs.fs.log import start_logging
from apollofs.fs.mountinfo import has_mounts_below
from apollofs.fs.page_dropper import PageDropper, Piece
from apollofs.fs.page_table import PageTableView
from apollofs.fs.wire_constants import Notify
from apollofs.fs.wire_notify import inc_epoch, notify, refuse_waiting
from apollofs.fs.wire_replies import encode_inval_inode

log = logging.getLogger("apollofs.fs.guard")
CONTROL_FD, READY_FD = 0, 1
CHECK_S = 0.25
"""How often it looks at the table at least: timers of a process do not count while the host sleeps, leases do."""
TEND_S = 0.01
STACK_BYTES = 256 << 10
"""Of each thread that drops pages."""
END_S = 10.0
"""For the last drop."""


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """What the daemon tells its guard."""

    fuse_fd: int
    table_fd: int
    lead_s: float
    """How long before the end of the proven lease it begins."""
    device: str
    """ "major:minor" of the mount."""
    mountpoint: str
    names: bool
    """Whether the kernel caches names, so that they are outdated too."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Guard:
    """Serves until the daemon has ended."""

    def __init__(self, options: GuardOptions) -> None:
        self._options = options
        self._table = PageTableView(options.table_fd)
        self._dropper = PageDropper(self._drop)
        self._poller = select.poll()
        self._poller.register(CONTROL_FD, select.POLLIN)
        self._dropped_for_s = 0.0
        self._drops = 0
        """How often it has dropped for the lease that was proven until then: twice at most."""

    def serve(self) -> None:
        """Watch over the lease; returns when the daemon has ended and all is dropped."""
        while not self._poller.poll(self._wait_s() * 1000):
            self._dropper.tend()
            if self._is_due():
                self._drop_all()
        self._end()

    def _wait_s(self) -> float:
        if self._dropper.wants_tending:
            return TEND_S
        return min(CHECK_S, max(0.0, self._due_s() - _boot_time()))

    def _is_due(self) -> bool:
        return self._due_s() <= _boot_time()

    def _due_s(self) -> float:
        """When to drop next, in seconds since boot."""
        until_s = self._table.proven_until_s
        if until_s != self._dropped_for_s:
            self._dropped_for_s, self._drops = until_s, 0
        if until_s == 0 or self._drops == 2:
            return float("inf")
        return until_s - self._options.lead_s if self._drops == 0 else until_s

    def _drop_all(self) -> None:
        inos = self._table.inodes()
        if self._drops == 0:
            log.warning(
                "the daemon of %s does not renew its lease: the pages of %d open files are dropped",
                self._options.mountpoint,
                len(inos),
            )
        self._drops += 1
        self._table.note_drop()
        try:
            # names have run out by themselves, but on a host that has slept; mounts below an outdated name would go
            if self._options.names and not has_mounts_below(self._options.device):
                inc_epoch(self._options.fuse_fd)
        except OSError as exc:
            log.debug("the mount has ended: %s", exc)
        self._dropper.drop(inos)

    def _drop(self, piece: Piece) -> None:
        try:
            notify(self._options.fuse_fd, Notify.INVAL_INODE, encode_inval_inode(*piece))
        except OSError as exc:
            log.debug("the mount has ended: %s", exc)

    def _end(self) -> None:
        """The daemon has ended: let everybody go who waits for it, and leave no pages behind."""
        fd = self._options.fuse_fd
        refuse_waiting(fd, errno.ENOTCONN)
        self._dropper.drop(self._table.inodes())
        deadline_s = time.monotonic() + END_S
        while self._dropper.is_busy and time.monotonic() < deadline_s:
            time.sleep(TEND_S)
            self._dropper.tend()
            refuse_waiting(fd, errno.ENOTCONN)


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> None:
    """The process, from its start to its end. Signals that are meant for the daemon do not end it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start_logging(None)
    threading.stack_size(STACK_BYTES)
    guard = Guard(GuardOptions(**json.loads(sys.argv[1])))
    os.write(READY_FD, b"r")
    os.close(READY_FD)
    guard.serve()
    # a thread that waits in the kernel must not be waited for; the descriptor goes when the last one has come back
    os._exit(0)


if __name__ == "__main__":
    main()
