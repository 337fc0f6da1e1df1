"""Mounts of one volume, and what their daemons cost and count."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_processes import memory_bytes, process_s

from apollofs.fs.control import ask, socket_path
from apollofs.fs.mountinfo import mount_at
from tests.mounted.harness import Bodies, LocalBodies, Mount, Namespace

SITE = "here"
ASK_DEADLINE_S = 60.0
CHECK_DEADLINE_S = 1200.0


@contextmanager
def namespace(bodies: Bodies | None = None) -> Iterator[Namespace]:
    """A volume on an etcd of its own. At the end it is checked and gone; a warning in a daemon's log is an error.

    `bodies`: where it keeps them; a local directory unless given.
    """
    with (
        tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory,
        Namespace.made(Path(directory), [bodies or LocalBodies(SITE)]) as made,
    ):
        made.check_deadline_s = CHECK_DEADLINE_S
        yield made


def status(mount: Mount) -> dict[str, Any]:
    """What `apollofs status --json` reports, asked without the command: that would cost a benchmark its processor."""
    entry = mount_at(str(mount.path))
    assert entry is not None, "it is mounted"
    runtime = mount.namespace.environment()["APOLLOFS_RUNTIME_DIR"]
    return ask(socket_path(runtime, entry.device), "status", deadline_s=ASK_DEADLINE_S)


def processor_s(mount: Mount) -> float:
    """The processor time that its daemon has spent so far, seconds."""
    return process_s(mount.pid)


def resident_bytes(mount: Mount) -> int:
    """The memory of its daemon (RSS)."""
    return memory_bytes(mount.pid)


def resident_peak_bytes(mount: Mount) -> int:
    """The most that it has had since `forget_peak`, or since it began."""
    return memory_bytes(mount.pid, "VmHWM")


def forget_peak(mount: Mount) -> None:
    """From now on `resident_peak_bytes` counts anew."""
    Path(f"/proc/{mount.pid}/clear_refs").write_text("5")
