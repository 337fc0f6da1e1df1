"""Whether threads have taken in the replies that were written to them.

A reply wakes the thread that waits for it; what the thread then does with it in the kernel can't be seen. It is done
when the thread sends its next request, sleeps, has ended, or has been on a processor for a while since.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import trio

RECENT_S = 1.0
"""A thread that was woken so long ago has run."""
THREADS_MAX = 4096
POLLS_MAX = 50
POLL_S = 0.002
RUN_NS = 100_000
"""Time on a processor that is ample for taking in a reply."""


class Receipts:
    """Of the replies that concern directories (numbers of groups)."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, float]] = {}
        """For each thread the directory of its last reply, and when that was sent; the oldest first."""

    def sent(self, tid: int, group: int) -> None:
        """A reply about a directory is about to be written to a thread, which so has taken in the one before."""
        self._sent.pop(tid, None)
        self._sent[tid] = (group, time.monotonic())
        if len(self._sent) > THREADS_MAX:
            self._sent.pop(next(iter(self._sent)))

    def missing(self, group: int) -> list[int]:
        """The threads whose last reply was about `group`, and that may not have taken it in."""
        since = time.monotonic() - RECENT_S
        return [tid for tid, (about, at) in self._sent.items() if about == group and at > since]

    async def wait(self, tids: Iterable[int]) -> bool:
        """Wait a tenth of a second at most for threads to take in what they were sent by now. Whether all did."""
        sent = {tid: self._sent.get(tid) for tid in tids}
        ran = {tid: _run_ns(tid) for tid in sent}
        for _ in range(POLLS_MAX):
            for tid in list(sent):
                if self._sent.get(tid) != sent[tid] or _has_run(tid, ran[tid]):
                    del sent[tid]
            if not sent:
                return True
            await trio.sleep(POLL_S)
        return False


def _has_run(tid: int, before_ns: int) -> bool:
    try:
        stat = Path(f"/proc/{tid}/stat").read_bytes()
    except OSError:
        return tid != 0 and not os.path.exists(f"/proc/{tid}")
    state = stat[stat.rindex(b")") + 2 :][:1]
    return state != b"R" or _run_ns(tid) > before_ns + RUN_NS


def _run_ns(tid: int) -> int:
    """Nanoseconds that a thread has been on a processor."""
    try:
        return int(Path(f"/proc/{tid}/schedstat").read_bytes().split()[0])
    except (OSError, IndexError, ValueError):
        return 1 << 63
