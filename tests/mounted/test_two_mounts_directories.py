"""Directories that both mounts change at once, small ones and one of 200,000 names."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.records import MountRecord, Owner
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.volume import Volume, open_volume
from tests.mounted import clients
from tests.mounted.client import Client
from tests.mounted.clients import errno_of
from tests.mounted.conftest import Places

pytestmark = pytest.mark.mounted

MANY = 200_000
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=60, slots=32)


def test_one_mount_wins_each_exclusive_create(here: Path, there: Path, client: Client, other_client: Client) -> None:
    running = [
        client.start(clients.create_many, here, "f", 60),
        other_client.start(clients.create_many, there, "f", 60),
    ]
    assert sum(each.result() for each in running) == 60
    assert len(os.listdir(here)) == len(os.listdir(there)) == 60


def test_renames_across_each_other_form_no_cycle(here: Path, there: Path) -> None:
    for _ in range(10):
        (here / "a").mkdir()
        (here / "b").mkdir()
        with ThreadPoolExecutor(2) as threads:
            one = threads.submit(errno_of, os.rename, here / "a", here / "b" / "a")
            two = threads.submit(errno_of, os.rename, there / "b", there / "a" / "b")
        # the one that comes second finds its target gone, or below itself
        assert sorted((one.result(), two.result()))[0] == 0
        assert sorted((one.result(), two.result()))[1] in (errno.ENOENT, errno.EINVAL)
        outer = os.listdir(there)
        assert len(outer) == 1
        (inner,) = os.listdir(here / outer[0])
        (there / outer[0] / inner).rmdir()
        (here / outer[0]).rmdir()


def test_rmdir_and_create_exclude_each_other(here: Path, there: Path) -> None:
    for number in range(15):
        (here / "directory").mkdir()
        with ThreadPoolExecutor(2) as threads:
            removing = threads.submit(errno_of, os.rmdir, here / "directory")
            creating = threads.submit(errno_of, Path.touch, there / "directory" / f"file{number}")
        found = removing.result(), creating.result()
        assert found in ((0, errno.ENOENT), (errno.ENOTEMPTY, 0)), found
        if creating.result() == 0:
            (here / "directory" / f"file{number}").unlink()
            (there / "directory").rmdir()


async def fill(url: tuple[tuple[str, int], ...], volume_name: str, directory: int, count: int) -> None:
    """Empty files f000000.. straight through the metadata layer, many at once: through the kernel it takes minutes."""
    store = EtcdStore(EtcdConfig(url))
    record = MountRecord(0, "test", os.getpid(), "/nowhere", "east", "0", 0)
    try:
        async with open_volume(store, volume_name, "east", OPTIONS, record) as volume, trio.open_nursery() as nursery:
            for worker in range(OPTIONS.slots):
                nursery.start_soon(_fill_part, volume, directory, range(worker, count, OPTIONS.slots))
    finally:
        await store.aclose()


async def _fill_part(volume: Volume, directory: int, numbers: range) -> None:
    for number in numbers:
        await volume.mknod(directory, b"f%06d" % number, 0o100644, 0, Owner(0, 0))
