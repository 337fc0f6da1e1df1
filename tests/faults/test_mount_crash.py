"""Mounts that are killed or frozen, and an etcd that goes away, amid work."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.mount_faults import content, open_and_write, read_or_errno, save_until_it_fails, saved, until, works
from tests.mounted.client import Client
from tests.mounted.clients import errno_of, flock, fsync, open_as, write
from tests.mounted.harness import LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
LEASE_S = 3
SIZES = pytest.mark.parametrize("size", [1000, 300_000, 2_500_000], ids=["inline", "blocks", "passthrough"])


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "1M")) as namespace:
        yield namespace


def mounted(namespace: Namespace, site: str) -> Mount:
    return namespace.mount(site, "--lease-ttl", str(LEASE_S))


@SIZES
def test_what_was_fsynced_survives_kill_9(namespace: Namespace, size: int, tmp_path: Path) -> None:
    west, east = mounted(namespace, "west"), mounted(namespace, "east")
    with Client.started() as client:
        writing = client.start(save_until_it_fails, west.path, tmp_path / "report", size)
        until(lambda: saved(tmp_path / "report") >= 20, "20 files saved")
        west.kill()
        assert writing.result() in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    count = saved(tmp_path / "report")
    for number in range(count):
        assert (east.path / f"f{number}").read_bytes() == content(number, size), number
    there = sorted(os.listdir(east.path))
    assert set(there) >= {f"f{number}" for number in range(count)}
    assert len(there) <= count + 1
    assert namespace.violations() == []
    # A crashed mount is mounted over at the same place, once its dead mount has been taken away.
    again = namespace.mount("west", "--lease-ttl", str(LEASE_S), name="again")
    assert works(again.path / "new")
    assert (east.path / "new").read_bytes() == b"works"


def test_locks_of_a_killed_mount_are_free(namespace: Namespace) -> None:
    west, east = mounted(namespace, "west"), mounted(namespace, "east")
    (west.path / "lock").touch()
    with Client.started() as holder, Client.started() as waiter:
        holder.call(open_as, "lock", west.path / "lock", os.O_RDWR)
        holder.call(flock, "lock", 2)
        waiter.call(open_as, "lock", east.path / "lock", os.O_RDWR)
        assert waiter.call(errno_of, flock, "lock", 2 | 4) == errno.EWOULDBLOCK
        waiting = waiter.start(flock, "lock", 2)
        west.kill()
        waiting.result()


def test_a_frozen_mount_changes_nothing_and_serves_again(namespace: Namespace, tmp_path: Path) -> None:
    west, east = mounted(namespace, "west"), mounted(namespace, "east")
    west.expected_logs += [r"has lost its lease", r"no new session yet", r"uncommitted", r"session"]
    (west.path / "before").write_bytes(b"before")
    session = west.status()["session"]
    with Client.started() as client, Client.started() as other:
        client.call(open_as, "kept", west.path / "kept", os.O_CREAT | os.O_RDWR)
        assert client.call(os.stat, west.path / "before").st_size == 6
        west.signal(signal.SIGSTOP)
        writing = client.start(open_and_write, west.path / "frozen", b"frozen")
        renaming = other.start(errno_of, os.rename, west.path / "before", west.path / "renamed")
        try:
            until(lambda: not _alive(namespace, session), "the end of the frozen mount's lease")
            (east.path / "meanwhile").write_bytes(b"meanwhile")
            os.unlink(east.path / "before")
        finally:
            west.signal(signal.SIGCONT)
        assert writing.result() in (0, errno.EIO, errno.ESTALE)
        assert renaming.result() in (errno.ENOENT, errno.EIO, errno.ESTALE)
        until(lambda: works(west.path / "after"), "the mount serves again")
    status = west.status()
    assert status["session_alive"]
    assert status["session"] > session
    assert (west.path / "meanwhile").read_bytes() == b"meanwhile"
    names = set(os.listdir(east.path))
    assert {"after", "meanwhile"} <= names
    assert not names & {"before", "renamed"}
    assert (east.path / "after").read_bytes() == b"works"
    if "frozen" in names:
        assert (east.path / "frozen").read_bytes() in (b"", b"frozen")


def test_a_frozen_mount_serves_nothing_older_than_its_lease(namespace: Namespace) -> None:
    """Its kernel answers by itself what others can't change; a change elsewhere waits for the end of the lease."""
    west, east = mounted(namespace, "west"), mounted(namespace, "east")
    west.expected_logs += [r"has lost its lease", r"no new session yet", r"session"]
    (west.path / "directory").mkdir()
    for name in ("file", "old"):
        (west.path / "directory" / name).touch(0o600)
    here, there = west.path / "directory", east.path / "directory"
    until(lambda: _answers_by_itself(west, here), "the kernel answers by itself")
    with Client.started() as client, Client.started() as other, Client.started() as third:
        west.signal(signal.SIGSTOP)
        try:
            (there / "file").chmod(0o640)
            os.rename(there / "old", there / "new")
            changed = client.start(os.stat, here / "file")
            gone, come = other.start(errno_of, os.stat, here / "old"), third.start(errno_of, os.stat, here / "new")
        finally:
            west.signal(signal.SIGCONT)
        assert changed.result().st_mode & 0o777 == 0o640
        assert gone.result() == errno.ENOENT
        assert come.result() == 0


def _answers_by_itself(mount: Mount, directory: Path) -> bool:
    """Whether the kernel answers for some names in `directory`, "new" is not there, without asking the daemon."""
    before = mount.status()["fuse"]["requests"]
    for name in ("file", "old", "new"):
        errno_of(os.stat, directory / name)
    return bool(mount.status()["fuse"]["requests"] == before)


def has_saved(report: Path, count: int) -> bool:
    return saved(report) >= count


def _alive(namespace: Namespace, session: int) -> bool:
    return any(one["session"] == session and one["alive"] for one in namespace.report("mounts", namespace.url))


def test_uncommitted_writes_of_a_lost_session_are_errors(namespace: Namespace) -> None:
    """Who wrote and has not synced is told by fsync; the file is as it was committed last."""
    west, east = mounted(namespace, "west"), mounted(namespace, "east")
    west.expected_logs += [r"has lost its lease", r"no new session yet", r"session", r"uncommitted"]
    (west.path / "file").write_bytes(b"committed")
    session = west.status()["session"]
    # in a process of its own: a new process that inherits the descriptor would hang on the frozen mount
    with Client.started() as client:
        client.call(open_as, "kept", west.path / "file", os.O_RDWR)
        client.call(write, "kept", b"uncommitt", 0)
        west.signal(signal.SIGSTOP)
        try:
            until(lambda: not _alive(namespace, session), "the end of the frozen mount's lease")
        finally:
            west.signal(signal.SIGCONT)
        until(lambda: works(west.path / "after"), "the mount serves again")
        assert client.call(errno_of, fsync, "kept") in (errno.EIO, errno.ESTALE)
    assert (east.path / "file").read_bytes() == b"committed"


@SIZES
def test_etcd_restarted_amid_work(namespace: Namespace, size: int, tmp_path: Path) -> None:
    """Nobody is told anything: what was asked for takes a little longer."""
    west, east = namespace.mount("west"), namespace.mount("east")
    for mount in (west, east):
        mount.expected_logs += [r"etcd", r"watch", r"unavailable", r"unreachable"]
    with Client.started() as client:
        writing = client.start(save_until_it_fails, west.path, tmp_path / "report", size)
        for done in (10, 20, 30):
            until(partial(has_saved, tmp_path / "report", done), f"{done} files saved")
            namespace.cluster.server.kill()
            namespace.cluster.server.start()
        count = saved(tmp_path / "report")
        until(lambda: saved(tmp_path / "report") >= count + 10 or writing.is_done(), "work goes on")
        assert not writing.is_done()
        client.kill()
    for number in range(saved(tmp_path / "report")):
        assert read_or_errno(east.path / f"f{number}") == content(number, size), number
