"""Checkpoints are saved while the daemon is killed, again and again: nothing that was saved is lost or torn.

APOLLOFS_KILLS=200 kills more often than every run does.
"""

from __future__ import annotations

import errno
import os
import random
import re
from pathlib import Path
from time import sleep

import pytest

from tests.faults.mount_faults import content, until
from tests.mounted.client import Client
from tests.mounted.harness import LocalBodies, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
KILLS = int(os.environ.get("APOLLOFS_KILLS", "4"))
SIZES = (900, 70_000, 3_000_000)
LEASE_S = 3
OBJECT = re.compile("[0-9a-f]{8}")


def save_until_it_fails(directory: Path, report: Path, first: int) -> int:
    """Save `first`, `first` + 1... as checkpoints are, each under its number; the errno that ends it."""
    number = first
    with report.open("ab", buffering=0) as told:
        while True:
            size = SIZES[number % len(SIZES)]
            try:
                fd = os.open(directory / f"{number}.tmp", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
                try:
                    data = content(number, size)
                    for at in range(0, size, 500_000):
                        os.pwrite(fd, data[at : at + 500_000], at)
                    if number % 2:
                        os.fsync(fd)
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
                os.rename(directory / f"{number}.tmp", directory / str(number))
            except OSError as exc:
                return exc.errno or errno.EIO
            told.write(b"%d\n" % number)
            number += 1


def saved(report: Path) -> int:
    return len(report.read_bytes().splitlines()) if report.exists() else 0


def collected(namespace: Namespace) -> int:
    """Run the collector; how many objects the sites still hold."""
    report = namespace.report("gc", namespace.url, "--grace", "0")
    assert report["errors"] == []
    return sum(path.is_file() for path in namespace.directory.glob("blobs-*/**/*") if OBJECT.fullmatch(path.name))


@pytest.mark.expects_log(r"left behind|never committed")
def test_kill_9_amid_saves(tmp_path: Path) -> None:
    rng = random.Random(KILLS)
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "1M")) as namespace:
        east = namespace.mount("east", "--lease-ttl", str(LEASE_S))
        report = tmp_path / "report"
        for round_ in range(KILLS):
            west = namespace.mount("west", "--lease-ttl", str(LEASE_S), name=f"west{round_}")
            west.expected_logs += [r"left behind", r"never committed"]
            before = saved(report)
            with Client.started() as client:
                writing = client.start(save_until_it_fails, west.path, report, before)
                wanted = before + rng.randrange(1, 7)
                until(lambda wanted=wanted: saved(report) >= wanted, "some are saved")  # type: ignore[misc]
                sleep(rng.random() * 0.05)
                west.kill()
                assert writing.result() in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
            for number in range(before, saved(report)):
                assert (east.path / str(number)).read_bytes() == content(number, SIZES[number % len(SIZES)]), number
        whole = [name for name in os.listdir(east.path) if not name.endswith(".tmp")]
        for name in whole:
            assert (east.path / name).read_bytes() == content(int(name), SIZES[int(name) % len(SIZES)]), name
        assert namespace.violations() == []
        for name in os.listdir(east.path):
            (east.path / name).unlink()
        # the last session ends with its lease
        until(lambda: collected(namespace) == 0, "gc leaves no orphan")
        print(f"\n{KILLS} kills: {saved(report)} files saved, none lost or torn")
