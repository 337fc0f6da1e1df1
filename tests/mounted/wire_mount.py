"""Mounts wire_probe_fs in a subprocess and runs clients on it in others, all with bounded waits.

No call into the mount is made by the test process itself, so that a mount which hangs fails a test, not the run.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

ROOT = Path(__file__).parents[2]
WAIT_S = 30
_PRELUDE = "import errno, fcntl, json, os, signal, struct, sys\nmnt = sys.argv[1]\n"


def wait_readable(stream: IO[str]) -> None:
    ready, _, _ = select.select([stream], [], [], WAIT_S)
    assert ready, "nothing was printed in time"


class Probe:
    """One mount of wire_probe_fs."""

    def __init__(self, mountpoint: Path, log: Path, options: dict[str, Any]) -> None:
        self.mountpoint = mountpoint
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.mounted.wire_probe_fs", str(mountpoint), json.dumps(options)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
            )
        wait_readable(self.out)
        assert self.out.readline() == "ready\n", log.read_text()

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def start(self, code: str) -> subprocess.Popen[str]:
        """A client process on this mount; its first argument is the mountpoint, its stdout JSON."""
        return subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + code, str(self.mountpoint)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> Any:
        """What a client that ran to its end printed, parsed."""
        return finish(self.start(code))

    def seen(self) -> dict[str, Any]:
        """What the handlers were told so far."""
        seen: dict[str, Any] = self.run("print(os.getxattr(mnt, 'user.seen').decode())")
        return seen

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask the mount until `condition` holds for what it has seen."""
        deadline = monotonic() + WAIT_S
        while not condition(seen := self.seen()):
            assert monotonic() < deadline, self.log.read_text()
        return seen

    def end(self, command: list[str]) -> dict[str, Any]:
        """End the mount by `command` and return what the process says at its end."""
        subprocess.run(command, check=True, timeout=WAIT_S)
        out, _ = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, self.log.read_text()
        last: dict[str, Any] = json.loads(out)
        return last

    def clean_up(self) -> None:
        """Leave nothing mounted and nothing running, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if f" {self.mountpoint} " in Path("/proc/self/mounts").read_text():
            # By force: that aborts the connection, which frees threads that wait in the kernel.
            subprocess.run(["umount", "-f", "-l", str(self.mountpoint)], check=False, timeout=WAIT_S)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self.out.close()


def finish(client: subprocess.Popen[str]) -> Any:
    try:
        out, err = client.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        client.kill()
        raise
    assert client.returncode == 0, err
    return json.loads(out) if out else None


Mount = Callable[..., Probe]


@contextmanager
def probes_under(directory: Path) -> Iterator[Mount]:
    """A function that mounts one probe with the options it is given; all are cleaned up at the end."""
    probes: list[Probe] = []

    def mount_one(**options: Any) -> Probe:
        mountpoint = directory / f"mnt{len(probes)}"
        mountpoint.mkdir()
        probes.append(Probe(mountpoint, directory / f"log{len(probes)}", options))
        return probes[-1]

    try:
        yield mount_one
    finally:
        for probe in probes:
            probe.clean_up()
