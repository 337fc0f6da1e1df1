"""Mounts of one volume with bodies in a local directory, and the counters that their daemons keep."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollofs.fs.control import ask, socket_path
from apollofs.fs.mountinfo import mount_at
from tests.mounted.harness import LocalBodies, Mount, Namespace

SITE = "here"
ASK_DEADLINE_S = 60.0
CHECK_DEADLINE_S = 1200.0


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A volume on an etcd of its own. At the end it is checked and gone; a warning in a daemon's log is an error."""
    with (
        tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory,
        Namespace.made(Path(directory), [LocalBodies(SITE)]) as made,
    ):
        made.check_deadline_s = CHECK_DEADLINE_S
        yield made


def status(mount: Mount) -> dict[str, Any]:
    """What `apollofs status --json` reports, asked without the command: that would cost a benchmark its processor."""
    entry = mount_at(str(mount.path))
    assert entry is not None, "it is mounted"
    runtime = mount.namespace.environment()["APOLLOFS_RUNTIME_DIR"]
    return ask(socket_path(runtime, entry.device), "status", deadline_s=ASK_DEADLINE_S)


def resident_bytes(mount: Mount) -> int:
    """The memory of its daemon (RSS)."""
    for line in Path(f"/proc/{mount.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the daemon {mount.pid} has ended")
