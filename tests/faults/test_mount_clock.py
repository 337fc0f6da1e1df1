"""The wall clock of a host is set back and forth by an hour under its mount: it makes no difference but to times."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.mount_faults import content, until
from tests.mounted.client import Client
from tests.mounted.clients import flock, open_as
from tests.mounted.harness import LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
LEASE_S = 3
HOUR_S = 3600
STEPS_S = (HOUR_S, -HOUR_S, 2 * HOUR_S, 0)
"""By how much the clock is wrong, one after the other."""
NEAR_S = 60
SIZE = 3_000_000


@dataclass
class Host:
    """A mount, and the file that says how wrong its clock is."""

    mount: Mount
    clock: Path
    wrong_s: int = 0

    def set_clock(self, wrong_s: int) -> None:
        new = self.clock.with_suffix(".new")
        new.write_text(f"{wrong_s:+d}\n")
        new.rename(self.clock)
        self.wrong_s = wrong_s

    def is_now(self, at_s: float) -> bool:
        """Whether a time is about now by this host's clock."""
        return abs(time.time() + self.wrong_s - at_s) < NEAR_S


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "1M")) as namespace:
        yield namespace


@pytest.fixture
def host(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Its clock is right at first."""
    clock = tmp_path / "clock"
    monkeypatch.setenv("APOLLOFS_TEST_CLOCK", str(clock))
    clock.write_text("+0\n")
    namespace.mount_module = "tests.support.stepped_clock_mount"
    mount = namespace.mount("west", "--lease-ttl", str(LEASE_S))
    namespace.mount_module = "apollofs.fs.cli"
    return Host(mount, clock)


def attributes(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def agree(writer: Path, reader: Path, number: int) -> None:
    """Whatever is done on one mount the other sees at once: names, attributes, bytes, what is gone."""
    data = content(number, SIZE)
    (writer / "new").write_bytes(data)
    assert (reader / "new").read_bytes() == data
    os.rename(writer / "new", writer / "file")
    assert not (reader / "new").exists()
    assert (reader / "file").read_bytes() == data
    (writer / "file").chmod(0o600 + number % 8)
    assert attributes(reader / "file") == attributes(writer / "file")
    with (writer / "file").open("ab") as file:
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())
        assert (reader / "file").stat().st_size == SIZE + 4
    (writer / "file").unlink()
    assert os.listdir(reader) == os.listdir(writer) == []


def test_nothing_is_stale_and_the_session_stays(namespace: Namespace, host: Host) -> None:
    """For more than a lease after each step; a lock that is held stays held."""
    west, east = host.mount, namespace.mount("east", "--lease-ttl", str(LEASE_S))
    (west.path / "shared").mkdir()
    (west.path / "lock").touch()
    session = west.status()["session"]
    number = 0
    with Client.started() as client:
        client.call(open_as, "lock", west.path / "lock", os.O_RDWR)
        client.call(flock, "lock", fcntl.LOCK_EX)
        for wrong_s in STEPS_S:
            host.set_clock(wrong_s)
            began = time.monotonic()
            while time.monotonic() < began + LEASE_S + 1:
                number += 1
                agree(west.path / "shared", east.path / "shared", number)
                agree(east.path / "shared", west.path / "shared", number)
            assert west.status()["session"] == session
            with (east.path / "lock").open("rb+") as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_times_follow_the_clock(namespace: Namespace, host: Host) -> None:
    """Back too: a clock that was an hour ahead for a moment does not mark what comes after it."""
    west = host.mount.path
    (west / "old").write_bytes(content(1, SIZE))
    for wrong_s in STEPS_S:
        host.set_clock(wrong_s)
        name = f"at {wrong_s}"
        with (west / name).open("w+b") as file:  # through the daemon: the kernel's clock is right
            file.write(content(2, SIZE))
        (west / f"{name} d").mkdir()
        for path in (west / name, west / f"{name} d"):
            found = path.stat()
            assert host.is_now(found.st_mtime) and host.is_now(found.st_ctime), path
        assert host.is_now(west.stat().st_mtime)  # its ctime is the latest of two records
        os.utime(west / "old")
        (west / "old").chmod(0o600)
        assert host.is_now((west / "old").stat().st_mtime) and host.is_now((west / "old").stat().st_ctime)


def test_what_was_unlinked_can_be_restored(namespace: Namespace, host: Host) -> None:
    """By a host whose clock is an hour ahead, and collected by one whose clock is right."""
    host.set_clock(HOUR_S)
    (host.mount.path / "file").write_bytes(content(1, SIZE))
    (host.mount.path / "file").unlink()
    host.set_clock(0)
    assert namespace.report("gc", namespace.url, "--grace", "5m")["tombstones"] == 0
    (found,) = namespace.report("trash", "list", namespace.url)
    namespace.command("trash", "restore", namespace.url, str(found["ino"]))
    until(lambda: (host.mount.path / "file").exists(), "it is back")
    assert (host.mount.path / "file").read_bytes() == content(1, SIZE)
