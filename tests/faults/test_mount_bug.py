"""A bug in one handler gives its request EIO, and the log a traceback; the mount lives."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.buggy_mount import BUGS
from tests.faults.mount_faults import until, works
from tests.mounted.client import Client
from tests.mounted.clients import errno_of
from tests.mounted.harness import LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]


class BuggyNamespace(Namespace):
    """Whose mounts have the bugs of `buggy_mount.py`."""

    mount_module = "tests.faults.buggy_mount"


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with BuggyNamespace.made(tmp_path_factory.mktemp("bug"), [LocalBodies("here")]) as namespace:
        mount = namespace.mount("here")
        mount.expected_logs += [r"failed with EIO"]
        yield mount


@pytest.mark.parametrize("name", sorted(bug.decode() for bug in BUGS))
def test_an_exception_of_any_type_is_eio_for_its_request_alone(mount: Mount, name: str) -> None:
    mount.log.news()
    assert errno_of(os.mkdir, mount.path / f"bug-{name}") == errno.EIO
    (record,) = mount.log.news()
    assert "ERROR" in record
    assert "Traceback (most recent call last)" in record
    assert "buggy_mkdir" in record
    assert name in record
    assert works(mount.path / "after")
    assert errno_of(os.mkdir, mount.path / f"good-{name}") == 0


def test_a_reply_of_the_wrong_type_is_eio(mount: Mount) -> None:
    mount.log.news()
    assert errno_of(os.mkdir, mount.path / "odd-reply") == errno.EIO
    (record,) = mount.log.news()
    assert "ERROR" in record
    assert works(mount.path / "after")


def test_kill_9_lets_everybody_go_whatever_is_stuck(tmp_path: Path) -> None:
    """A request has locked a directory whose names are to be given back: no thread of the daemon may wait for that lock
    in the kernel, where it can't be killed."""
    with BuggyNamespace.made(tmp_path, [LocalBodies("here")]) as namespace:
        west, east = (namespace.mount("here", "--lease-ttl", "60", name=name) for name in ("west", "east"))
        (west.path / "directory").mkdir()
        until(lambda: _gives_names(west, west.path / "directory"), "the kernel keeps names")
        drops = west.status()["kernel_cache"]["drops"]
        with Client.started() as client, Client.started() as other:
            making = client.start(errno_of, os.mkdir, west.path / "directory" / "stuck")
            until(lambda: west.status()["fuse"]["requests_by_kind"]["mkdir"] == 2, "the request is there")
            other.start(errno_of, os.mkdir, east.path / "directory" / "other")
            until(lambda: west.status()["kernel_cache"]["drops"] > drops, "names are given back")
            west.kill()
            assert making.result() in (errno.ENOTCONN, errno.ECONNABORTED)


def _gives_names(mount: Mount, directory: Path) -> bool:
    """Whether the kernel keeps names, after one more look at the directory."""
    errno_of(os.stat, directory / "absent")
    return bool(mount.status()["kernel_cache"]["names"])
