"""Three mounts of one namespace, each with its own way to etcd and its own processes; and what can happen to one."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Final, Generic, TypeVar

from tests.faults.history_client import Part, Told, act, prepare, survey
from tests.mounted.client import Client, Pending
from tests.mounted.harness import LocalBodies, Mount, Namespace
from tests.support.history import Operation
from tests.support.ways import Way

SITES = ("west", "east", "north")
PROCESSES_EACH = 2
LEASE_S = 3
SCHEDULE_S = 6.0
SURVEY_S = 45.0
SHORT_S, LONG_S = 0.7, LEASE_S + 1.0
"""How long a fault lasts: the lease outlasts the one, not the other."""
DELAY_MS = 80.0
"""What a request takes longer, for a mount that is slow to answer."""
AHEAD_S = 1.0
"""A change is in etcd so long after it was answered at the latest, as long as all is well."""
LIFE_NUMBERS = 100_000
"""How many operations a process may do with one daemon."""
LOGGED = (r"lease", r"session", r"uncommitted", r"etcd", r"watch")


@dataclass(frozen=True)
class Fault:
    """What happens to one mount, and when, in seconds from the start of a schedule."""

    kind: str
    host: int
    at_s: float
    lasts_s: float


@dataclass
class Schedule:
    """One run of all processes. Its directory is named after its seed."""

    seed: int
    faults: list[Fault]
    began_s: float = field(default_factory=monotonic)
    lasts_s: float = SCHEDULE_S

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """One mount has a fault, or two have one each; it outlasts the lease or not. Seeds that follow each other have
        every kind of fault.
        """
        rng, kinds = random.Random(seed), sorted(FAULTS)
        hosts = rng.sample(range(len(SITES)), rng.choice([1, 2]))
        chosen = [kinds[seed % len(kinds)], rng.choice(kinds)]
        return cls(
            seed,
            [
                Fault(kind, host, rng.uniform(0.3, 2.0), rng.choice([SHORT_S, LONG_S]))
                for kind, host in zip(chosen, hosts, strict=False)
            ],
        )

    @property
    def name(self) -> str:
        return f"schedule-{self.seed}"


class Host:
    """One of the three. `way` leads its mount to etcd."""

    options: tuple[str, ...] = ("--lease-ttl", str(LEASE_S))

    def __init__(self, namespace: Namespace, number: int, site: str, way: Way, clients: list[Client]) -> None:
        self.number = number
        self.site = site
        self.way = way
        self.clients = clients
        self._namespace = namespace
        self._lives = 0
        self._running: list[Pending[Told]] = []
        self._told: list[Told] = []
        self._losses_before = 0
        self.mount = self._mounted()

    def _mounted(self) -> Mount:
        self._lives += 1
        url = f"etcd://{self.way.address}/{self._namespace.volume}"
        name = f"{self.site}-{self._lives}"
        mount = self._namespace.mount(self.site, *self.options, name=name, url=url)
        mount.expected_logs += LOGGED
        return mount

    def part(self, schedule: Schedule, process: int, until_s: float) -> Part:
        return Part(
            seed=schedule.seed,
            process=process,
            host=self.mount.path.name,
            root=self.mount.path / schedule.name,
            began_s=schedule.began_s,
            until_s=until_s,
            first=self._lives * LIFE_NUMBERS,
        )

    def _losses(self) -> int:
        """How often the mount has lost answered operations with its session."""
        return int(self.mount.status()["write_back"]["losses"])

    def has_lost(self) -> bool:
        """Whether it has since the schedule began."""
        return self._losses() > self._losses_before

    def start(self, schedule: Schedule) -> None:
        """Let the processes work until the schedule is over."""
        self._losses_before = self._losses()
        until_s = schedule.began_s + schedule.lasts_s
        first = self.number * PROCESSES_EACH
        self._running = [
            client.start(act, self.part(schedule, first + index, until_s)) for index, client in enumerate(self.clients)
        ]

    def collect(self) -> None:
        """Wait for the end of the processes' work."""
        while self._running:
            self._told.append(self._running.pop().result())

    def tell(self) -> list[Told]:
        """All that its processes have collected since the last call."""
        told, self._told = self._told, []
        return told

    def survey(self, schedule: Schedule) -> None:
        """One process looks at every name, as soon as the mount answers."""
        process = len(SITES) * PROCESSES_EACH + self.number
        self._told.append(self.clients[0].call(survey, self.part(schedule, process, monotonic() + SURVEY_S)))

    def prepare(self, schedule: Schedule) -> None:
        self.clients[0].call(prepare, self.mount.path / schedule.name)

    def restart(self, schedule: Schedule) -> None:
        """kill -9, and a new mount for the same processes."""
        self.mount.kill()
        self.collect()
        trouble = self.mount.clean_up()
        assert trouble == []
        self.mount = self._mounted()
        self.start(schedule)

    def freeze(self) -> None:
        self.mount.signal(signal.SIGSTOP)

    def mend(self) -> None:
        """End of whatever has been done to it, but for a new life."""
        self.mount.signal(signal.SIGCONT)
        self.way.heal()


HostT = TypeVar("HostT", bound=Host)
FAULTS: Final[dict[str, Callable[[Host, Schedule], object]]] = {
    "killed": Host.restart,
    "frozen": lambda host, _: host.freeze(),
    "cut off": lambda host, _: host.way.blackhole(),
    "reset": lambda host, _: host.way.refuse(),
    "slow": lambda host, _: host.way.slow_down(DELAY_MS),
    "loses a reply": lambda host, _: host.way.swallow_replies(1),
}
"""Each lasts until the host is mended."""


@dataclass
class Trio(Generic[HostT]):
    """The three hosts, and what can happen to one."""

    namespace: Namespace
    hosts: list[HostT]
    faults: Mapping[str, Callable[[HostT, Schedule], object]]
    at_rest: bool = True
    """No schedule is under way, nor has one been left without an end."""

    @classmethod
    @contextmanager
    def started(cls, directory: Path, kind: type[Namespace] = Namespace) -> Iterator[Trio[Host]]:
        """Mounted and idle; gone at the end of the block. `kind` may have mounts with a bug."""
        with ExitStack() as stack:
            sites = [LocalBodies(site) for site in SITES]
            # ways outlast the namespace, which unmounts through them
            ways = stack.enter_context(ExitStack())
            namespace = stack.enter_context(kind.made(directory, sites))
            hosts = []
            for number, site in enumerate(SITES):
                way = ways.enter_context(Way.started(namespace.cluster.endpoints))
                clients = [stack.enter_context(Client.started()) for _ in range(PROCESSES_EACH)]
                hosts.append(Host(namespace, number, site, way, clients))
            yield Trio(namespace, hosts, FAULTS)

    def run(self, schedule: Schedule) -> list[Told]:
        """What all processes have to tell, and at the end one more on each mount. Bounded in time."""
        assert self.at_rest, "an earlier schedule has not come to its end"
        self.at_rest = False
        self.hosts[0].prepare(schedule)
        try:
            for host in self.hosts:
                host.start(schedule)
            self._break(schedule)
        finally:
            for host in self.hosts:
                host.mend()
        for host in self.hosts:
            host.collect()
        for host in self.hosts:
            host.survey(schedule)
        self.at_rest = True
        lost = [fault for fault in schedule.faults if fault.kind == "killed" or self.hosts[fault.host].has_lost()]
        told = [told for host in self.hosts for told in host.tell()]
        return [replace(each, history=list(self._certain(schedule, lost, each.history))) for each in told]

    def _certain(self, schedule: Schedule, faults: list[Fault], history: list[Operation]) -> Iterator[Operation]:
        """What a mount had answered ahead of etcd when it was killed or cut off may be gone with its session
        (docs/POSIX.md): changes of that time may have happened or not, and what was seen there says nothing."""
        for operation in history:
            if not any(self._may_be_lost(schedule, fault, operation) for fault in faults):
                yield operation
            elif not operation.only_looks:
                yield replace(operation, unknown=True)

    def _may_be_lost(self, schedule: Schedule, fault: Fault, operation: Operation) -> bool:
        begun_s = schedule.began_s + fault.at_s
        over_s = begun_s + (0.0 if fault.kind == "killed" else fault.lasts_s + 2 * LEASE_S)
        is_there = operation.host.startswith(f"mnt-{self.hosts[fault.host].site}-")
        return is_there and operation.returned_s >= begun_s - AHEAD_S and operation.invoked_s <= over_s

    def _break(self, schedule: Schedule) -> None:
        """Do what is to happen, each at its time, and undo it."""
        pause = Event()
        events: list[tuple[float, Callable[[], object]]] = []
        for fault in schedule.faults:
            host, begin_s = self.hosts[fault.host], schedule.began_s + fault.at_s
            events.append((begin_s, partial(self.faults[fault.kind], host, schedule)))
            events.append((begin_s + fault.lasts_s, host.mend))
        for at_s, happen in sorted(events, key=itemgetter(0)):
            pause.wait(max(0.0, at_s - monotonic()))
            happen()
