"""A cache disk that is full, or turns read-only: an error or it goes through, never wrong bytes, never a hang."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.faulty_mounts import Disk, small_disk
from tests.faults.mount_faults import content, open_and_write, read_or_errno, until
from tests.mounted.client import Client
from tests.mounted.clients import close, errno_of, fsync, open_as, read, write
from tests.mounted.harness import LocalBodies, Mount, Namespace

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
MIB = 1 << 20
SIZE = 16 * MIB
DISK_BYTES = 400 * MIB
"""A mount leaves 256 MiB free, and ext4 needs some for itself."""
FULL = {0, errno.ENOSPC}
WORN = {0, errno.ENOSPC, errno.EROFS, errno.EIO}
WAYS = {"passthrough": os.O_CREAT | os.O_WRONLY | os.O_TRUNC, "daemon": os.O_CREAT | os.O_RDWR}


@contextmanager
def mounts(tmp_path: Path) -> Iterator[tuple[Mount, Mount, Disk]]:
    """One whose cache is on a disk of its own, and another one."""
    with (
        small_disk(tmp_path, "cache-worn", DISK_BYTES) as disk,
        Namespace.made(tmp_path, [LocalBodies("here")], format_options=("--block-size", "1M")) as namespace,
    ):
        worn, other = namespace.mount("here", name="worn"), namespace.mount("here", name="other")
        worn.expected_logs.append(r"(?i)\A(?:(?!Traceback)[\s\S])*(space|cache|disk|read-only|staging)")
        yield worn, other, disk


def test_a_full_disk(tmp_path: Path) -> None:
    """Writing is ENOSPC or goes through; reading goes through; and with space again all is well."""
    with mounts(tmp_path) as (full, other, disk), Client.started() as client:
        data = content(1, SIZE)
        assert open_and_write(other.path / "big", data) == 0
        filler = disk.path / "filler"
        client.call(_fill, filler)
        assert client.start(open_and_write, full.path / "new", data).result() in FULL
        assert client.start(read_or_errno, full.path / "big").result() == data
        assert client.call(open_and_write, full.path / "small", b"inline") in FULL
        filler.unlink()
        until(lambda: client.call(open_and_write, full.path / "later", data) == 0, "writing works again")
        assert client.call(read_or_errno, other.path / "later") == data


@pytest.mark.parametrize("way", list(WAYS))
def test_a_disk_that_fills_up_amid_a_save(tmp_path: Path, way: str) -> None:
    """What could not be written can be, once there is space, by the same descriptor."""
    with mounts(tmp_path) as (full, other, disk), Client.started() as client:
        data = content(2, SIZE)
        client.call(open_as, "saved", full.path / "saved", WAYS[way])
        client.call(write, "saved", data[: 4 * MIB], 0)
        filler = disk.path / "filler"
        client.call(_fill, filler)
        failed = client.call(_write_all, "saved", data[4 * MIB :], 4 * MIB)
        assert failed in FULL
        synced = client.call(errno_of, fsync, "saved")
        assert synced in FULL
        if failed == synced == 0:
            assert (other.path / "saved").read_bytes() == data
        filler.unlink()
        until(lambda: client.call(_write_all, "saved", data[4 * MIB :], 4 * MIB) == 0, "it can be written")
        client.call(fsync, "saved")
        assert (other.path / "saved").read_bytes() == data
        client.call(close, "saved")


@pytest.mark.parametrize("way", list(WAYS))
def test_a_disk_that_turns_read_only(tmp_path: Path, way: str) -> None:
    """Amid a save and amid reading. Saves fail, and what a mount elsewhere sees of them is what had been committed."""
    with mounts(tmp_path) as (worn, other, disk), Client.started() as client:
        data, saved = content(3, SIZE), content(4, SIZE)
        for name in ("half", "unread"):
            assert open_and_write(other.path / name, data) == 0
        client.call(open_as, "half", worn.path / "half", os.O_RDONLY)
        assert client.call(read, "half", MIB, 0) == data[:MIB]
        client.call(open_as, "saved", worn.path / "saved", WAYS[way])
        client.call(write, "saved", saved[: 4 * MIB], 0)
        client.call(fsync, "saved")
        client.call(write, "saved", saved[4 * MIB : 8 * MIB], 4 * MIB)
        disk.turn_read_only()
        failed = client.call(_write_all, "saved", saved[8 * MIB :], 8 * MIB)
        synced = client.call(errno_of, fsync, "saved")
        assert {failed, synced} <= WORN
        seen = (other.path / "saved").read_bytes()
        assert seen == saved[: len(seen)] and len(seen) >= 4 * MIB
        if failed == synced == 0:
            assert seen == saved
        assert client.start(read, "half", SIZE, 0).result() == data
        assert client.call(read_or_errno, worn.path / "unread") == data
        assert client.call(errno_of, close, "saved") in WORN
        assert client.call(open_and_write, worn.path / "new", b"inline") in WORN
        assert client.call(open_and_write, worn.path / "large", data) in WORN
        assert client.call(read_or_errno, worn.path / "unread") == data
        client.call(close, "half")
        worn.unmount()
        assert (other.path / "unread").read_bytes() == data


def _write_all(name: str, data: bytes, offset: int) -> int:
    """Write in pieces until it is done or fails: 0, or the errno."""
    at = 0
    while at < len(data):
        try:
            at += write(name, data[at : at + MIB], offset + at)
        except OSError as exc:
            return exc.errno or errno.EIO
    return 0


def _fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
    os.sync()
