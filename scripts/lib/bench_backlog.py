"""An agent works off a backlog of many small files: how fast, and how much memory it takes. See scripts/bench.

The files are made while no agent runs; then one begins, finds them in the journal, and copies. The metadata is what it
always is, on a real etcd. The stores are none: one makes the bytes of an object from its name, the other only counts
what it is given, so that what is measured is the agent and not a disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from bench_processes import memory_bytes, process_s

from apollofs.blobstore import BlobStat, BlobStore, BlobStoreOptions, BlockStore, Buffer
from apollofs.blobstore.footer import footer_of, pack_footer
from apollofs.blobstore.metrics import BlobMetrics
from apollofs.blobstore.open import wrap
from apollofs.fs.agent import AgentOptions, run_agent
from apollofs.fs.agent.state import AgentState, read_state
from apollofs.fs.allocator import keep_buffers
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.format import add_site, format_volume
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.put_values import VALUES_MAX, NewBody, ValueWrite
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO, Extent, MountRecord, Owner
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume, open_volume
from tests.support.etcd_server import EtcdCluster

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

VOLUME, FROM, TO, TO_ID = "bench", "west", "east", 2
FILE_BYTES = 12_000
FILES_IN_DIRECTORY = 1024
MAKERS = 64
LOOK_EVERY_S = 2.0
START_S, LEASE_S = 60.0, 60
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=60, delegations=False, write_back=False)
ME = Owner(0, 0)
Endpoints = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Look:
    """The agent at one moment."""

    after_s: float
    files: int
    """That it has worked off."""
    processor_s: float
    resident_bytes: int


@dataclass(frozen=True)
class Findings:
    files: int
    made_s: float
    looks: list[Look]


# -- the backlog ------------------------------------------------------------------------------------------------------


def record(site: str) -> MountRecord:
    return MountRecord(0, "bench", os.getpid(), "", site, "", 0)


async def make_volume(store: Store) -> None:
    """Two sites, and a policy by which the second gets everything."""
    await format_volume(store, VOLUME, site_name=FROM, site_store=(("kind", "memory"),))
    await add_site(store, VOLUME, TO, (("kind", "memory"),))
    async with open_volume(store, VOLUME, FROM, OPTIONS, record(FROM)) as volume:
        await volume.placement.set_policy(ROOT_INO, Policy(soon=(TO_ID,)))


async def make_files(store: Store, count: int) -> None:
    """Files with a blob each, which are committed like values: sixteen in a transaction."""
    async with open_volume(store, VOLUME, FROM, OPTIONS, record(FROM)) as volume:
        firsts = iter(range(0, count, FILES_IN_DIRECTORY))

        async def make() -> None:
            for first in firsts:
                directory = await volume.mkdir(ROOT_INO, b"d%d" % first, 0o755, ME)
                for at in range(first, min(first + FILES_IN_DIRECTORY, count), VALUES_MAX):
                    numbers = range(at, min(at + VALUES_MAX, first + FILES_IN_DIRECTORY, count))
                    await volume.put_values([new_file(volume, directory.ino, number) for number in numbers])

        async with trio.open_nursery() as nursery:
            for _ in range(MAKERS):
                nursery.start_soon(make)


def new_file(volume: Volume, directory: int, number: int) -> ValueWrite:
    session = volume.session
    extents = (Extent(0, FILE_BYTES, session.new_blob(), 0, FILE_BYTES),)
    return ValueWrite(
        (directory, b"f%d" % number), body=NewBody(session.new_ino(), FILE_BYTES, None, extents, 0o644, ME)
    )


# -- the agent --------------------------------------------------------------------------------------------------------


class MadeUp(BlobStore):
    """Every object is there, with the bytes of a small file; what is put is gone."""

    def __init__(self) -> None:
        self._data = bytes(range(256)) * (FILE_BYTES // 256) + bytes(FILE_BYTES % 256)
        self._sums = footer_of(self._data)

    async def put(self, name: str, data: Buffer) -> None:
        await trio.lowlevel.checkpoint()

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        sealed = self._data + pack_footer(name, self._sums)
        return sealed[offset : None if length is None else offset + length]

    async def stat(self, name: str) -> BlobStat:
        await trio.lowlevel.checkpoint()
        return BlobStat(name, len(await self.read(name)), 0.0)

    async def delete(self, name: str) -> None:
        await trio.lowlevel.checkpoint()

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        await trio.lowlevel.checkpoint()
        for none in ():
            yield none

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def be_agent(store: Store) -> None:
    stores: dict[int, BlockStore] = {}

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return stores.setdefault(site, wrap(MadeUp(), BlobStoreOptions(), BlobMetrics()))

    options = AgentOptions(gc_every_s=0, retention_every_s=0, lease_ttl_s=LEASE_S)
    await run_agent(store, VOLUME, record(TO), open_store, BlobStoreOptions(), options)


async def state(store: Store) -> AgentState:
    """What the agent has written down. It does so every few seconds."""
    return await read_state(store, Keys(VOLUME), TO_ID)


async def until_known(store: Store) -> None:
    """Until an agent has written down a position in the journal, from which the next one goes on."""
    with trio.fail_after(START_S):
        while True:
            if (await state(store)).walked:
                return
            await trio.sleep(LOOK_EVERY_S)


async def watch(store: Store, agent: BaseProcess, count: int) -> list[Look]:
    """Until everything is copied. Raises RuntimeError where the agent ends before."""
    assert agent.pid is not None
    began, looks = time.monotonic(), [Look(0.0, 0, process_s(agent.pid), memory_bytes(agent.pid))]
    while looks[-1].files < count:
        await trio.sleep(LOOK_EVERY_S)
        if not agent.is_alive():
            raise RuntimeError("the agent has ended")
        files = int((await state(store)).facts.get("files", 0))
        if files < looks[-1].files:
            raise RuntimeError("the agent has lost its lease and counts anew")
        looks.append(Look(time.monotonic() - began, files, process_s(agent.pid), memory_bytes(agent.pid)))
    return looks


# -- all of it --------------------------------------------------------------------------------------------------------


def _in_process(part: str, endpoints: Endpoints, count: int) -> None:
    if part == "agent":
        keep_buffers(256 << 20)
    trio.run(_part, part, endpoints, count)


async def _part(part: str, endpoints: Endpoints, count: int) -> None:
    store = EtcdStore(EtcdConfig(endpoints))
    try:
        if part == "files":
            await make_files(store, count)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(be_agent, store)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()  # its session ends with it, and the next agent waits for no lease
    finally:
        await store.aclose()


def started(part: str, endpoints: Sequence[tuple[str, int]], count: int = 0) -> BaseProcess:
    """A process that makes the files, or is the agent."""
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(part, tuple(endpoints), count))
    process.start()
    return process


async def measure(directory: Path, count: int) -> Findings:
    with EtcdCluster.started(directory) as cluster:
        store = EtcdStore(EtcdConfig(cluster.endpoints))
        try:
            await make_volume(store)
            first = started("agent", cluster.endpoints)
            await until_known(store)
            first.terminate()
            first.join()
            began = time.monotonic()
            maker = started("files", cluster.endpoints, count)
            await trio.to_thread.run_sync(maker.join)
            made_s = time.monotonic() - began
            if maker.exitcode:
                raise RuntimeError("the files could not be made")
            agent = started("agent", cluster.endpoints)
            try:
                return Findings(count, made_s, await watch(store, agent, count))
            finally:
                agent.terminate()
                agent.join()
        finally:
            await store.aclose()


def show(found: Findings) -> None:
    print(f"{found.files} files made in {found.made_s:.0f} s")
    print(f"{'files done':>12}{'after s':>9}{'files/s':>9}{'core-ms each':>14}{'resident MiB':>14}")
    first, before = found.looks[0], found.looks[0]
    for tenth in range(1, 11):
        look = next(each for each in found.looks if each.files >= found.files * tenth / 10)
        if look.files == before.files:
            continue
        done, took_s = look.files - before.files, max(1e-9, look.after_s - before.after_s)
        spent_ms = (look.processor_s - before.processor_s) / done * 1000
        print(
            f"{look.files:12}{look.after_s:9.0f}{done / took_s:9.0f}{spent_ms:14.2f}{look.resident_bytes / 2**20:14.0f}"
        )
        before = look
    most = max(look.resident_bytes for look in found.looks)
    print(f"resident when it began: {first.resident_bytes >> 20} MiB; most: {most >> 20} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench backlog", description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="write all looks there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory:
        found = trio.run(measure, Path(directory), arguments.files)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
