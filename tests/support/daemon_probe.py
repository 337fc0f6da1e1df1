"""A program that starts a daemon of its own, for test_daemon: `daemon_probe.py MODE DIRECTORY`.

It prints what `start_detached` returned, or the error's line to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable

from apollofs.fs.daemon import PipeReadiness, start_detached
from apollofs.fs.user_error import UserError


def serve_until_told(readiness: PipeReadiness) -> int:
    """Answers, then lives until somebody writes to the fifo `end` in the directory."""
    facts = {
        "pid": os.getpid(),
        "leads_session": os.getsid(0) == os.getpid(),
        "directory": os.getcwd(),
        "descriptors": sorted(os.path.basename(os.readlink(f"/proc/self/fd/{n}")) for n in (0, 1, 2)),
        "open": len(os.listdir("/proc/self/fd")),
    }
    print("this goes to the log", flush=True)
    readiness.ready(facts)
    readiness.ready({"a second time": "changes nothing"})
    with open(os.path.join(sys.argv[2], "end"), "rb") as fifo:
        fifo.read(1)
    return 0


def fail(readiness: PipeReadiness) -> int:
    raise UserError("the reason,\nin one line")


def die(readiness: PipeReadiness) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def end_early(readiness: PipeReadiness) -> int:
    return 3


def unwanted(pid: int, number: int) -> None:
    """In place of os.kill where nobody may be signalled: the child was collected, and its number is anybody's."""
    sys.stderr.write(f"process {pid} was signalled\n")


def hang(readiness: PipeReadiness) -> int:
    with open(os.path.join(sys.argv[2], "pid"), "w", encoding="ascii") as file:
        file.write(str(os.getpid()))
    signal.pause()
    return 0


MODES: dict[str, Callable[[PipeReadiness], int]] = {
    "serve": serve_until_told,
    "fail": fail,
    "die": die,
    "end": end_early,
    "hang": hang,
}


def main() -> int:
    mode, directory = sys.argv[1:]
    if mode == "end":
        os.kill = unwanted
    try:
        found = start_detached(
            MODES[mode],
            log_path=os.path.join(directory, "log"),
            deadline_s=0.5 if mode == "hang" else 60,
            describe=str,
        )
    except UserError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
