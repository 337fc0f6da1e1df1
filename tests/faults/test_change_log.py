"""The change log amid kill -9 of mounts, archivers and consumers: the volume is rebuilt from it, and nobody misses any.

`APOLLOFS_CHANGES_OPERATIONS=50000` takes longer, `APOLLOFS_CHANGES_SEED` another course.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing
from pathlib import Path

import pytest
import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.changes import open_changes, records
from apollofs.metadata.changes.compaction import CompactionOptions, compact_behind_archive
from apollofs.metadata.changes.position import Position, parse_position
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from tests.faults.change_players import play
from tests.mounted.client import Client
from tests.mounted.harness import END_DEADLINE_S, ROOT, LocalBodies, Mount, Namespace
from tests.support.rebuilt import Rebuilt, differences, volume_facts

pytestmark = [pytest.mark.faults, pytest.mark.mounted, pytest.mark.slow]
OPERATIONS = int(os.environ.get("APOLLOFS_CHANGES_OPERATIONS", "2000"))
SEED = int(os.environ.get("APOLLOFS_CHANGES_SEED", "1"))
ROUND = 250
"""Operations of each mount between two misfortunes."""
MOUNTS = 3
LEASE_S = 4
ARCHIVE = ("changes", "archive", "--lease-ttl", "3", "--every", "1s", "--json")
READ_DEADLINE_S = 300


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    with Namespace.made(tmp_path, [LocalBodies("west"), LocalBodies("east")]) as namespace:
        yield namespace


class Command:
    """`apollofs ...` in the background, its output in files; started anew when it was killed."""

    def __init__(self, namespace: Namespace, name: str, words: tuple[str, ...]) -> None:
        self._namespace = namespace
        self._name = name
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self.outputs: list[Path] = []
        self.start()

    def start(self) -> None:
        self.outputs.append(self._namespace.directory / f"{self._name}-{len(self.outputs)}.out")
        with self.outputs[-1].open("wb") as out, self._errors.open("ab") as err:
            command = [sys.executable, "-m", "apollofs.fs.cli", *self._words]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=self._namespace.environment(), cwd=ROOT
            )

    @property
    def _errors(self) -> Path:
        return self._namespace.directory / f"{self._name}.err"

    def kill(self) -> None:
        """SIGKILL. It must have been alive."""
        assert self._process is not None
        assert self._process.poll() is None, self._errors.read_text()
        self._process.kill()
        self._process.wait(END_DEADLINE_S)
        assert "Traceback" not in self._errors.read_text()


class Course:
    """The course of one test: three mounts at work, an archiver, two consumers of one group."""

    def __init__(self, namespace: Namespace, stack: ExitStack, rng: random.Random) -> None:
        self.namespace = namespace
        self.rng = rng
        self.numbers = iter(range(1_000_000))
        self.mounts = [self.mount() for _ in range(MOUNTS)]
        self.clients = [stack.enter_context(Client.started()) for _ in range(MOUNTS)]
        url = namespace.url
        follow = ("changes", "read", url, "--group", "readers", "--follow", "--json")
        self.consumers = [Command(namespace, f"consumer{number}", follow) for number in range(2)]
        self.archiver = Command(namespace, "archiver", (*ARCHIVE[:2], url, *ARCHIVE[2:]))
        for command in (*self.consumers, self.archiver):
            stack.callback(command.kill)
        self.done = 0
        misfortunes: list[Callable[[], None]] = [
            self.kill_a_mount,
            self.kill_the_archiver,
            self.kill_the_archiver_and_compact,
            self.kill_a_consumer,
        ]
        rng.shuffle(misfortunes)
        self.misfortunes = itertools.cycle(misfortunes)

    def mount(self) -> Mount:
        number = next(self.numbers)
        site = ("west", "east")[number % 2]
        mount = self.namespace.mount(site, "--lease-ttl", str(LEASE_S), name=f"m{number}")
        mount.expected_logs += [r"session", r"lease", r"can't be committed yet"]
        return mount

    def round(self) -> None:
        """All mounts at work, and something bad happens."""
        playing = [
            client.start(play, mount.path, ROUND, self.rng.randrange(1 << 30))
            for client, mount in zip(self.clients, self.mounts, strict=True)
        ]
        playing[0].is_done(self.rng.random() / 2)
        next(self.misfortunes)()
        self.done += sum(pending.result() for pending in playing)

    def kill_a_mount(self) -> None:
        at = self.rng.randrange(MOUNTS)
        self.mounts[at].kill()
        assert self.mounts[at].clean_up() == []
        self.mounts[at] = self.mount()

    def kill_the_archiver(self) -> None:
        self.archiver.kill()
        self.archiver.start()

    def kill_the_archiver_and_compact(self) -> None:
        self.archiver.kill()
        archive_and_compact(self.namespace, keep_s=5)
        self.archiver.start()

    def kill_a_consumer(self) -> None:
        consumer = self.rng.choice(self.consumers)
        consumer.kill()
        consumer.start()


def archive_and_compact(namespace: Namespace, keep_s: float) -> None:
    """Archive everything; of what was archived, etcd keeps only the last seconds: less than the command would allow."""
    namespace.command(*ARCHIVE[:2], namespace.url, *ARCHIVE[2:], "--once", "--compact")

    async def compact() -> None:
        store = EtcdStore(EtcdConfig(namespace.cluster.endpoints))
        try:
            await compact_behind_archive(store, CompactionOptions(keep_s))
        finally:
            await store.aclose()

    trio.run(compact)


def positions(output: Path) -> list[Position]:
    """What a consumer has printed; a line that was cut off by its death does not count."""
    whole, _, _ = output.read_text().rpartition("\n")
    return [parse_position(json.loads(line)["position"]) for line in whole.splitlines()]


def test_the_log_rebuilds_the_volume_and_consumers_miss_nothing(namespace: Namespace) -> None:
    with ExitStack() as stack:
        course = Course(namespace, stack, random.Random(SEED))
        while course.done < OPERATIONS:
            course.round()
        for mount in course.mounts:
            mount.unmount()
    archive_and_compact(namespace, keep_s=0)
    last = Command(namespace, "last", ("changes", "read", namespace.url, "--group", "readers", "--json"))
    assert last._process is not None
    assert last._process.wait(READ_DEADLINE_S) == 0
    outputs = [output for consumer in (*course.consumers, last) for output in consumer.outputs]
    everything = trio.run(rebuilt, namespace)
    assert len(everything) > course.done / 2
    heard: set[Position] = set()
    for output in outputs:
        found = positions(output)
        if found:
            start = everything.index(found[0])
            assert found == everything[start : start + len(found)], output
            heard.update(found)
    assert heard == set(everything)
    segments = namespace.report("changes", "status", namespace.url)["segments"]
    assert segments > 1
    print(f"{course.done} operations, {len(everything)} records, {segments} segments, {len(outputs)} consumers")


async def rebuilt(namespace: Namespace) -> list[Position]:
    """Rebuild the volume from the whole log, archive and live, and compare; the positions of all records."""
    store = EtcdStore(EtcdConfig(namespace.cluster.endpoints))
    try:
        tree, found = Rebuilt(), list[Position]()
        async with open_changes(store, namespace.volume, BlobStoreOptions()) as changes:
            start = await changes.beginning()
            async with aclosing(records(changes, start)) as everything:
                async for record in everything:
                    tree.take(record)
                    found.append(record.position)
        assert differences(tree.facts(), await volume_facts(store, namespace.volume)) == []
        return found
    finally:
        await store.aclose()
