"""Kills daemons when a test takes too long, so that a mount that hangs fails one test instead of the run.

A process of its own: a test that waits in the kernel for a page of a mapped file holds the interpreter. On standard
input it reads lines, `PID PID ...` to watch from now on and an empty one for "all is well"; at the end of the input
it ends. After DEADLINE_S without a line it sends SIGKILL; the kernel then fails every waiting request.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEADLINE_S = 150.0


class Watchdog:
    """Made by `started`. Tests that hang lose the mounts they use."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Watchdog]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.mounted.watchdog"], stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        try:
            yield cls(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)

    def watch(self, pids: Iterable[int]) -> None:
        """From now on, until `calm`."""
        self._tell(" ".join(map(str, pids)))

    def calm(self) -> None:
        self._tell("")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()


def main() -> None:
    watched: list[int] = []
    while True:
        ready, _, _ = select.select([0], [], [], DEADLINE_S if watched else None)
        if not ready:
            for pid in watched:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            sys.stderr.write(f"watchdog: the test hangs; killed {watched}\n")
            watched = []
            continue
        text = os.read(0, 65536)
        if not text:
            return
        watched = [int(word) for word in text.decode().split("\n")[-2].split()]


if __name__ == "__main__":
    main()
