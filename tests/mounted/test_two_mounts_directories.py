"""Directories that both mounts change at once, small ones and one of 200,000 names."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from apollofs.metadata import codec
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Inode, Usage
from apollofs.metadata.store import Put
from tests.mounted import clients
from tests.mounted.client import Client
from tests.mounted.clients import errno_of
from tests.mounted.harness import LocalBodies, Namespace
from tests.mounted.watchdog import Watchdog

pytestmark = pytest.mark.mounted

MANY = 200_000
PUTS_MAX = 125
WORKERS = 4
INO_BASE = (1 << 32) + (1 << 31)
"""Numbers that no mount of the test comes to."""
GROWTH_MAX = 100 << 20
"""Bytes that listing may add to a daemon's memory."""


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


def memory_bytes(pid: int) -> int:
    """The most that a process has had in memory."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


async def fill(namespace: Namespace, directory: int) -> None:
    """MANY empty files f000000.. put into etcd as records: one create after the other takes minutes.

    Nothing may have the volume mounted meanwhile.
    """
    keys = Keys(namespace.volume)
    file = Inode(0, stat.S_IFREG | 0o644, 1, 0, 0, 0, 0, 0, 0, 0)
    store = EtcdStore(EtcdConfig(namespace.cluster.endpoints))

    async def put(first: int) -> None:
        numbers = range(first, min(first + PUTS_MAX, MANY))
        inodes = [(number, file._replace(ino=INO_BASE + number)) for number in numbers]
        puts = [Put(keys.dentry(directory, b"f%06d" % n), codec.encode_embedded(inode)) for n, inode in inodes]
        await store.txn((), tuple(puts))

    async def put_share(worker: int) -> None:
        for first in range(worker * PUTS_MAX, MANY, WORKERS * PUTS_MAX):
            await put(first)

    try:
        async with trio.open_nursery() as nursery:
            for worker in range(WORKERS):
                nursery.start_soon(put_share, worker)
        await store.txn((), (Put(keys.usage(0), codec.encode_usage(Usage(0, MANY))),))
    finally:
        await store.aclose()


@pytest.mark.slow
def test_a_directory_of_200_000_names_lists_completely_while_others_change_it(
    tmp_path: Path, watchdog: Watchdog, client: Client
) -> None:
    with Namespace.made(tmp_path, [LocalBodies("west"), LocalBodies("east")]) as namespace:
        first = namespace.mount("west")
        (first.path / "many").mkdir()
        number = (first.path / "many").stat().st_ino
        first.unmount()
        trio.run(fill, namespace, number)
        west, east = namespace.mount("west"), namespace.mount("east")
        watchdog.watch((west.pid, east.pid))
        before = memory_bytes(east.pid)
        churning = client.start(clients.churn, west.path / "many", 100)
        with os.scandir(east.path / "many") as entries:
            listed = Counter(entry.name for entry in entries)
        churning.result()
        stable = {f"f{number:06d}" for number in range(MANY)}
        assert {name for name in listed if not name.startswith("zz-churn")} == stable
        assert max(listed.values()) == 1
        assert memory_bytes(east.pid) - before < GROWTH_MAX
        # what was changed since is in the next listing
        (west.path / "many" / "f100000").unlink()
        assert set(os.listdir(east.path / "many")) == stable - {"f100000"}
        watchdog.calm()


def test_a_directory_that_was_moved_elsewhere_can_be_moved_at_once(here: Path, there: Path) -> None:
    """The kernel has it under its former name, and may not enter it under the new one amid a rename."""
    for name in ("from", "to", "from/moved"):
        (here / name).mkdir()
    (here / "from" / "moved" / "file").write_bytes(b"in it")
    assert (here / "from" / "moved" / "file").read_bytes() == b"in it"
    (there / "from" / "moved").rename(there / "to" / "moved")
    (here / "to" / "moved").rename(here / "from" / "again")
    assert (there / "from" / "again" / "file").read_bytes() == b"in it"
    assert [path.name for path in here.rglob("*")] == ["from", "to", "again", "file"]
