"""Fills a volume with many empty files, without a kernel: by group commit a fraction of what a mount would take."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from collections.abc import Sequence

import trio

from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.records import ROOT_INO, MountRecord, Owner
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.volume import Volume, open_volume

TASKS = 96
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=60, delegations=False)
ME = Owner(0, 0)


def file_names(count: int) -> list[str]:
    """What a directory is filled with."""
    return [f"f{number}" for number in range(count)]


def fill(endpoints: Sequence[tuple[str, int]], volume: str, site: str, directories: int, files: int) -> float:
    """Make `tree/d0`, `tree/d1`, ... with so many files in each; the seconds that it took. Raises RuntimeError.

    In a process of its own: gRPC is not to be where others are forked from.
    """
    began = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(tuple(endpoints), volume, site, directories, files)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the volume could not be filled")
    return time.monotonic() - began


def _run(endpoints: tuple[tuple[str, int], ...], volume: str, site: str, directories: int, files: int) -> None:
    trio.run(_fill, endpoints, volume, site, directories, files)


async def _fill(endpoints: tuple[tuple[str, int], ...], name: str, site: str, directories: int, files: int) -> None:
    record = MountRecord(0, "bench", os.getpid(), "", site, "", 0)
    store = EtcdStore(EtcdConfig(endpoints))
    try:
        async with open_volume(store, name, site, OPTIONS, record) as volume:
            tree = await volume.mkdir(ROOT_INO, b"tree", 0o755, ME)
            left = iter(range(directories))

            async def work() -> None:
                for number in left:
                    await _fill_directory(volume, tree.ino, number, files)

            async with trio.open_nursery() as nursery:
                for _ in range(TASKS):
                    nursery.start_soon(work)
    finally:
        await store.aclose()


async def _fill_directory(volume: Volume, tree: int, number: int, files: int) -> None:
    made = await volume.mkdir(tree, b"d%d" % number, 0o755, ME)
    for name in file_names(files):
        await volume.mknod(made.ino, name.encode(), stat.S_IFREG | 0o644, 0, ME)
