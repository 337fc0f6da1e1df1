"""The change log amid kill -9 of mounts, agents and consumers: the volume is rebuilt from it, and nobody misses any.

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
from apollofs.metadata.changes.position import Position, parse_position
from tests.faults.change_players import NAMES, Place, play
from tests.faults.change_steward import Steward, compact, opened
from tests.mounted.agents import AgentProcess, start_agent
from tests.mounted.client import Client
from tests.mounted.harness import END_DEADLINE_S, ROOT, LocalBodies, Mount, Namespace
from tests.support.rebuilt import Rebuilt, differences, volume_facts

pytestmark = [pytest.mark.faults, pytest.mark.mounted, pytest.mark.slow]
OPERATIONS = int(os.environ.get("APOLLOFS_CHANGES_OPERATIONS", "2000"))
SEED = int(os.environ.get("APOLLOFS_CHANGES_SEED", "1"))
ROUND = max(150, OPERATIONS // 60)
"""What each process tries between two misfortunes; a fifth of it succeeds."""
ROUND_DEADLINE_S = 300
MOUNTS = 3
PROCESSES = 2
"""On each mount."""
LEASE_S = 4
SITES = ("west", "east")
READ_DEADLINE_S = 300


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    with Namespace.made(tmp_path, [LocalBodies(site) for site in SITES]) as namespace:
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

    def end(self) -> None:
        """It ends by itself, and well."""
        assert self._process is not None
        assert self._process.wait(READ_DEADLINE_S) == 0, self._errors.read_text()


class Course:
    """The course of one test: three mounts at work, an agent at each site, of which one archives, two consumers of one
    group, and a steward."""

    def __init__(self, namespace: Namespace, stack: ExitStack, rng: random.Random) -> None:
        self.namespace = namespace
        self.rng = rng
        self.numbers = iter(range(1_000_000))
        self.mounts = [self.mount() for _ in range(MOUNTS)]
        self.clients = [stack.enter_context(Client.started()) for _ in range(MOUNTS * PROCESSES)]
        follow = ("changes", "read", namespace.url, "--group", "readers", "--follow", "--json")
        self.consumers = [Command(namespace, f"consumer{number}", follow) for number in range(2)]
        self.agents = {site: self.agent(site) for site in SITES}
        self.steward = Steward(namespace, rng)
        for consumer in self.consumers:
            stack.callback(consumer.kill)
        stack.callback(self.end_agents)
        self.done = self.rounds = 0
        misfortunes: list[Callable[[], None]] = [
            self.kill_a_mount,
            self.kill_an_agent,
            self.kill_an_agent_and_compact,
            self.kill_a_consumer,
        ]
        rng.shuffle(misfortunes)
        self.misfortunes = itertools.cycle(misfortunes)

    def mount(self) -> Mount:
        number = next(self.numbers)
        mount = self.namespace.mount(SITES[number % 2], "--lease-ttl", str(LEASE_S), name=f"m{number}")
        mount.expected_logs += [r"session", r"lease", r"can't be committed yet"]
        return mount

    def agent(self, site: str) -> AgentProcess:
        return start_agent(self.namespace, site, "--archive-every", "1s")

    def end_agents(self) -> None:
        """SIGKILL for those that are left."""
        while self.agents:
            kill_alive(self.agents.popitem()[1])

    def round(self, *misfortunes: Callable[[], None]) -> None:
        """All mounts at work, and something happens."""
        places = list(zip(self.mounts, NAMES, strict=False))
        playing = [
            client.start(play, Place(mount.path, home), ROUND, self.rng.randrange(1 << 30))
            for client, (mount, home) in zip(self.clients, places * PROCESSES, strict=True)
        ]
        playing[0].is_done(self.rng.random() / 2)
        for happen in misfortunes or (next(self.misfortunes), self.steward.act):
            happen()
        for pending in playing:
            assert pending.is_done(ROUND_DEADLINE_S)
            self.done += pending.result()
        self.rounds += 1

    def kill_a_mount(self) -> None:
        at = self.rng.randrange(MOUNTS)
        self.mounts[at].kill()
        assert self.mounts[at].clean_up() == []
        self.mounts[at] = self.mount()

    def kill_an_agent(self) -> None:
        site = self.rng.choice(SITES)
        kill_alive(self.agents[site])
        self.agents[site] = self.agent(site)

    def kill_an_agent_and_compact(self) -> None:
        """What etcd forgets is what the agents have archived up to some seconds ago, while they go on."""
        self.kill_an_agent()
        compact(self.namespace, keep_s=5)

    def kill_a_consumer(self) -> None:
        consumer = self.rng.choice(self.consumers)
        consumer.kill()
        consumer.start()

    def end(self) -> None:
        """Archive everything and have etcd forget it; then some more is done, which the archive does not have."""
        self.end_agents()
        self.namespace.command("changes", "archive", self.namespace.url, "--once", "--lease-ttl", "3")
        assert compact(self.namespace, keep_s=0)
        self.round(self.kill_a_consumer)
        for mount in self.mounts:
            mount.unmount()


def kill_alive(agent: AgentProcess) -> None:
    """SIGKILL. It must have been alive, and have logged nothing that is a bug."""
    assert agent.process.poll() is None, agent.log.path.read_text()
    agent.kill()
    assert "Traceback" not in agent.log.path.read_text()


def positions(output: Path) -> list[Position]:
    """What a consumer has printed; a line that was cut off by its death does not count."""
    whole, _, _ = output.read_text().rpartition("\n")
    return [parse_position(json.loads(line)["position"]) for line in whole.splitlines()]


def test_the_log_rebuilds_the_volume_and_consumers_miss_nothing(namespace: Namespace) -> None:
    with ExitStack() as stack:
        course = Course(namespace, stack, random.Random(SEED))
        while course.done < OPERATIONS:
            course.round()
        course.end()
    last = Command(namespace, "last", ("changes", "read", namespace.url, "--group", "readers", "--json"))
    last.end()
    outputs = [output for consumer in (*course.consumers, last) for output in consumer.outputs]
    assert namespace.violations() == []
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
    archive = namespace.report("changes", "status", namespace.url)
    assert archive["segments"] > 1
    assert everything[0].revision < archive["through"] < everything[-1].revision
    print(
        f"{course.done} operations in {course.rounds} rounds, {len(everything)} records, {archive['segments']} segments"
    )
    print(f"{len(namespace.mounts)} mounts, {len(outputs)} readings, steward: {course.steward.done}")


async def rebuilt(namespace: Namespace) -> list[Position]:
    """Rebuild the volume from the whole log, archive and live, and compare; the positions of all records."""
    tree, found = Rebuilt(), list[Position]()
    async with opened(namespace) as store:
        async with open_changes(store, namespace.volume, BlobStoreOptions()) as changes:
            start = await changes.beginning()
            async with aclosing(records(changes, start)) as everything:
                async for record in everything:
                    tree.take(record)
                    found.append(record.position)
        assert differences(tree.facts(), await volume_facts(store, namespace.volume)) == []
        return found
