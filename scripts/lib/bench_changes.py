"""The change log: what a record takes in etcd and in the archive, and how fast it is archived and read. See
scripts/bench."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from apollofs.blobstore import BlobStoreOptions, LocalLocation, prepare_blob_store
from apollofs.fs.changes import open_archiver, open_changes
from apollofs.metadata import journal
from apollofs.metadata.changes.archiver import ArchiveOptions
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.format import format_volume
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, MountRecord
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.session_opening import open_session
from apollofs.metadata.store import Store
from tests.support.etcd_server import EtcdCluster

VOLUME = "bench"
DIRECTORIES = 200
WRITERS = 16
Rates = tuple[float, float]
"""Records in a second by the clock, and of processor time."""


@dataclass(frozen=True)
class Figures:
    """Of one volume, as medians over the rounds: bytes a record, and records a second; `cpu`: in a second of processor
    time of this process, which says what a quiet machine would do."""

    records_in_a_transaction: int
    records: int
    etcd_bytes: float
    archive_bytes: float
    archived: float
    archived_cpu: float
    read_archive: float
    read_archive_cpu: float
    read_live: float
    read_live_cpu: float


async def fill(session: Session, count: int, batch: int) -> float:
    """Commit `count` records, `batch` in each transaction, as mounts do; bytes a record in etcd."""
    now = time.time_ns()
    directories = [session.new_ino() for _ in range(DIRECTORIES)]
    made = [Change(Kind.MKDIR, ino, ROOT_INO, b"directory-%d" % ino, now, 0o40755) for ino in directories]
    for at in range(0, len(made), batch):
        await session.commit((), (), tuple(made[at : at + batch]), time_ns=now)
    numbers = iter(range(count // batch))
    sizes: list[int] = []

    async def write() -> None:
        for number in numbers:
            base = time.time_ns()
            changes = tuple(change(session, directories, number * batch + at, base) for at in range(batch))
            sizes.append(len(journal.encode(SlotRecord(number, 1, base, changes))))
            await session.commit((), (), changes, time_ns=base)

    async with trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(write)
    return sum(sizes) / (len(sizes) * batch)


def change(session: Session, directories: Sequence[int], number: int, base_ns: int) -> Change:
    """Creates, commits of bodies and renames, in many directories."""
    parent, name, when = directories[number % DIRECTORIES], b"file-%08d" % number, base_ns + number % 1000 * 10_000
    if number % 8 == 7:
        old = directories[(number + 1) % DIRECTORIES]
        return Change(Kind.RENAME, session.new_ino(), parent, name, when, 0o100644, old_parent=old, old_name=name)
    if number % 2:
        return Change(Kind.COMMIT, session.new_ino(), parent, name, when, 0o100644, 4096, uid=1000, gid=1000)
    return Change(Kind.CREATE, session.new_ino(), parent, name, when, 0o100644, uid=1000, gid=1000)


async def measure(directory: Path, count: int, batch: int, rounds: int) -> Figures:
    with EtcdCluster.started(directory / "etcd") as cluster:
        async with AsyncExitStack() as stack:
            store = EtcdStore(EtcdConfig(cluster.endpoints))
            stack.push_async_callback(store.aclose)
            location = LocalLocation(str(directory / "blobs"))
            await prepare_blob_store(location, BlobStoreOptions(), create=True)
            await format_volume(store, VOLUME, site_name="here", site_store=tuple(location.to_dict().items()))
            session = await open_session(
                store, Keys(VOLUME), SessionOptions(lease_ttl_s=3600), MountRecord(0, "h", 1, "", "here", "0", 0), 1
            )
            etcd_bytes = await fill(session, count, batch)
            live = [await read(store, count) for _ in range(rounds)]
            archived, size, through = await archive(store, count)
            await store.compact(through)
            read_archive = [await read(store, count) for _ in range(rounds)]
            await session.close()
            figures = (*archived, *middle(read_archive), *middle(live))
            return Figures(batch, count, etcd_bytes, size, *figures)


def middle(rounds: Sequence[Rates]) -> Rates:
    """The median of each of both."""
    return statistics.median(each[0] for each in rounds), statistics.median(each[1] for each in rounds)


class Watch:
    """A stopwatch for both times."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def rates(self, count: int) -> Rates:
        return count / (time.perf_counter() - self._began), count / (time.process_time() - self._cpu)


async def archive(store: Store, count: int) -> tuple[Rates, float, int]:
    """Records archived in a second, bytes a record in the archive, and the revision that it reaches."""
    async with open_archiver(store, VOLUME, BlobStoreOptions(), "", ArchiveOptions()) as archiver:
        watch = Watch()
        await archiver.run(once=True)
        assert archiver.report.changes >= count
        report, rates = archiver.report, watch.rates(archiver.report.changes)
        return rates, report.stored_bytes / report.changes, report.through


async def read(store: Store, count: int) -> Rates:
    """Records read in a second, paths and all, from the beginning."""
    async with open_changes(store, VOLUME, BlobStoreOptions()) as changes:
        start, found = await changes.beginning(), 0
        watch = Watch()
        async with aclosing(changes.read(start)) as batches:
            async for batch in batches:
                found += len(batch.records)
        assert found >= count
        return watch.rates(found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench changes", description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="in transactions of 40; a quarter of it singly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", help="write the figures there")
    options = parser.parse_args()
    rows = []
    for batch, count in ((40, options.records), (1, options.records // 4)):
        with tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory:
            rows.append(trio.run(measure, Path(directory), count, batch, options.rounds))
    names = list(asdict(rows[0]))
    width = max(map(len, names)) + 2
    print("".join(f"{name:>{width}}" for name in names))
    for row in rows:
        print("".join(f"{value:>{width}.0f}" for value in asdict(row).values()))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
