"""The command `apollofs` as tests use it: a process of its own, with a deadline, in a world of its own.

    world = World(directory)          # runtime directory, logs, caches, mountpoints: all below `directory`
    world.run("mount", url, mountpoint, ...)
    world.clean_up()                  # nothing of it is mounted or runs afterwards

`World.run` returns what was printed; `World.fail` expects a failure and returns its one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apollofs.fs.embedded import EmbeddedEtcd
from apollofs.fs.mountinfo import MountEntry, mount_at, read_mounts

DEADLINE_S = 120


class CommandFailed(AssertionError):
    """A command that should have worked did not."""


class World:
    """Everything that one test's commands make."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("APOLLOFS_ETCD", "NOTIFY_"))},
            "APOLLOFS_RUNTIME_DIR": str(directory / "runtime"),
            "HOME": str(directory / "home"),
        }
        self._started: set[int] = set()

    def execute(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        return subprocess.run(
            [sys.executable, "-m", "apollofs.fs.cli", *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env={**self.environment, **environment},
            check=False,
        )

    def run(self, *words: object) -> str:
        """What a command prints that must succeed."""
        done = self.execute(*words)
        if done.returncode != 0:
            raise CommandFailed(f"apollofs {' '.join(map(str, words))}: {done.returncode}: {done.stderr}")
        return done.stdout

    def report(self, *words: object) -> Any:
        """What a command reports with --json."""
        return json.loads(self.run(*words, "--json"))

    def fail(self, *words: object, status: int = 1, **environment: str) -> str:
        """The one line of a command that must fail with this status, and print nothing else."""
        done = self.execute(*words, **environment)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.strip()

    def format(self, url: str, site: str = "here") -> None:
        """Format a volume whose bodies lie in a directory of this world."""
        self.run("format", url, "--site", site, "--blobs", self.blobs(site), "--create-bucket")

    def blobs(self, site: str) -> str:
        return (self.directory / f"blobs-{site}").as_uri()

    def mount(self, url: str, name: str, *options: object, site: str = "here") -> Path:
        """Mount on a directory of this name; the mountpoint."""
        mountpoint = self.directory / name
        # not Path.mkdir(exist_ok=True): that looks at what is there, and a dead mount can't be looked at
        with contextlib.suppress(FileExistsError):
            os.mkdir(mountpoint)
        words = ("mount", url, mountpoint, "--site", site, "--cache-dir", self.directory / f"cache-{name}")
        report = self.report(*words, "--log-file", self.log(name), *options)
        self._started.add(report["pid"])
        return mountpoint

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def pid(self, mountpoint: Path) -> int:
        """The process of a mount."""
        return int(self.report("status", mountpoint)["pid"])

    def mounts(self) -> list[MountEntry]:
        """The apollofs mounts below this world."""
        inside = str(self.directory) + "/"
        return [entry for entry in read_mounts() if entry.is_apollofs and entry.mountpoint.startswith(inside)]

    def clean_up(self) -> None:
        """Unmount what is left, end what runs."""
        for entry in self.mounts():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.execute("umount", entry.mountpoint, "--lazy")
            if mount_at(entry.mountpoint) is not None:
                subprocess.run(["umount", "--lazy", entry.mountpoint], timeout=DEADLINE_S, check=False)
        for pid in self._started:
            if not await_end(pid, 10 if is_ours(pid) else 0) and is_ours(pid):
                os.kill(pid, signal.SIGKILL)
                assert await_end(pid)
        assert self.mounts() == []


def is_ours(pid: int) -> bool:
    """Whether the number still is that of one of our commands."""
    try:
        return b"apollofs.fs.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def await_end(pid: int, deadline_s: float = DEADLINE_S) -> bool:
    """Whether a process has ended within the deadline."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(deadline_s * 1000))
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def etcd_server(directory: Path) -> Iterator[str]:
    """An etcd of its own; gives host:port."""
    server = EmbeddedEtcd(str(directory), os.environ)
    with server.locked():
        state = server.start()
        try:
            yield f"127.0.0.1:{state.client_port}"
        finally:
            server.stop()
