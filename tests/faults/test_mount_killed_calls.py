"""Processes that are killed while a call of theirs, which has been applied, waits for etcd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.mount_faults import until
from tests.mounted.clients import errno_of
from tests.mounted.harness import LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    with Namespace.made(tmp_path, [LocalBodies("here")]) as namespace:
        yield namespace


def _exists(path: Path) -> bool:
    return errno_of(os.stat, path) == 0


def _look(directory: Path) -> dict[str, bool]:
    return {name: _exists(directory / name) for name in ("a", "b", "c")}


def _queued(mount: Mount) -> float:
    return float(mount.status()["write_back"]["queued"])


def test_a_rename_of_a_killed_process_is_seen(namespace: Namespace) -> None:
    mount, other = namespace.mount("here", name="west"), namespace.mount("here", name="east")
    directory = mount.path / "directory"
    directory.mkdir()
    (directory / "a").write_bytes(b"a")
    for _ in range(3):
        assert _look(directory) == {"a": True, "b": False, "c": False}
    until(lambda: _queued(mount) == 0, "nothing waits")
    with namespace.cluster.server.paused():
        source, target = str(directory / "a"), str(directory / "b")
        process = subprocess.Popen([sys.executable, "-c", f"import os; os.rename({source!r}, {target!r})"])
        until(lambda: _queued(mount) > 0, "it is applied, and waits")
        process.kill()
        process.wait(timeout=60)
        assert _look(directory) == {"a": False, "b": True, "c": False}
    assert _look(other.path / "directory") == {"a": False, "b": True, "c": False}
