"""Two mounts create one name: who comes second opens a file like any other, with its permissions."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.faults.racing_mount import SOMEBODY
from tests.mounted.harness import COMMAND_DEADLINE_S, LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
STRANGER = 2000
OPEN = """
import os, sys
directory = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
try:
    file = os.open(sys.argv[2], os.O_CREAT | os.O_RDWR, 0o644, dir_fd=directory)
except OSError as exc:
    print(exc.errno, -1)
else:
    print(0, os.fstat(file).st_uid)
"""


class RacingNamespace(Namespace):
    """Whose mounts are `racing_mount.py`."""

    mount_module = "tests.faults.racing_mount"


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with RacingNamespace.made(tmp_path_factory.mktemp("race"), [LocalBodies("here")]) as namespace:
        mount = namespace.mount("here")
        mount.path.chmod(0o1777)
        yield mount


def opened_by(mount: Mount, name: str, user: int) -> tuple[int, int]:
    """errno of open(O_CREAT | O_RDWR) by `user`, and the owner of what was opened."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(mount.path), name, str(user)],
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE_S,
        check=True,
    )
    code, owner = done.stdout.split()
    return int(code), int(owner)


def test_a_strangers_file_stays_private(mount: Mount) -> None:
    assert opened_by(mount, "raced-by-a-stranger", STRANGER) == (errno.EACCES, -1)
    assert opened_by(mount, "not-there-yet", STRANGER) == (0, STRANGER)


@pytest.mark.parametrize("user", [SOMEBODY, 0])
def test_who_may_open_it_does(mount: Mount, user: int) -> None:
    assert opened_by(mount, f"raced-by-{user}", user) == (0, SOMEBODY)


def test_exclusively_nobody_opens_it(mount: Mount) -> None:
    with pytest.raises(FileExistsError):
        os.open(mount.path / "raced-exclusively", os.O_CREAT | os.O_EXCL | os.O_RDWR)
