"""The mounts of a history at three sites: far from etcd, with stores and agents of their own, and what can happen.

Each schedule runs below a directory that has one of the policies: copies at any second site before fsync returns,
copies everywhere soon, or none.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.history_hosts import FAULTS, PROCESSES_EACH, Fault, Host, Schedule, Trio
from tests.faults.history_learners import LATEST, PUBLISHED, Learned, Lesson, learn
from tests.mounted.agents import AgentProcess
from tests.mounted.client import Client, Pending
from tests.mounted.harness import END_DEADLINE_S, Mount
from tests.mounted.three_sites import SITES, ThreeSites
from tests.support.radosgw_server import RadosGateway

LEASE_S = 5
SCHEDULE_S = 9.0
SHORT_S, LONG_S = 1.5, LEASE_S + 1.0
"""How long a fault lasts: the lease outlasts the one, not the other."""
PATIENCE_S = 25
"""How long commits and readers wait for a store: longer than any fault lasts, so that none of them fails."""
SLOW_STORE_MS = 150.0
POLICIES: Final = {"any": ("--commit-any", "2"), "soon": ("--async", ",".join(SITES)), "none": ()}
"""By the name of the directory that has it."""
STORE_LOGGED = (r"site", r"store", r"s3", r"copy|copies")
FORMAT = ("--block-size", "64K", "--inline-max", "0")
"""Every body is in a store, the smallest too."""


class SiteSchedule(Schedule):
    """In a directory with a policy."""

    @classmethod
    def of(cls, seed: int) -> SiteSchedule:
        """One host has a fault, or two have one each, of different kinds. Seeds that follow each other have every kind
        of fault, and then the next policy.
        """
        rng, kinds = random.Random(f"sites {seed}"), sorted(SITE_FAULTS)
        first = kinds[seed % len(kinds)]
        chosen = [first, rng.choice([kind for kind in kinds if kind != first])]
        hosts = rng.sample(range(len(SITES)), rng.choice([1, 2]))
        faults = [
            Fault(kind, host, rng.uniform(0.5, 2.0), rng.choice([SHORT_S, LONG_S]))
            for kind, host in zip(chosen, hosts, strict=False)
        ]
        return cls(seed, faults, lasts_s=SCHEDULE_S)

    @property
    def name(self) -> str:
        return f"{list(POLICIES)[self.seed // len(SITE_FAULTS) % len(POLICIES)]}/schedule-{self.seed}"


class SiteHost(Host):
    """A mount, the store and the agent of its site, a member of etcd, and somebody who learns of files."""

    options = (
        *("--lease-ttl", str(LEASE_S)),
        *("-o", f"commit_deadline={PATIENCE_S},read_deadline={PATIENCE_S}"),
    )

    def __init__(self, sites: ThreeSites, number: int, clients: list[Client], learner: Client) -> None:
        self._sites = sites
        self._learner = learner
        self._lesson: Pending[Learned] | None = None
        self._learned: list[Learned] = []
        site = SITES[number]
        self.store = sites.stores[site]
        self._member = sites.namespace.cluster.servers[number]
        self._member_runs = True
        self._agent: AgentProcess | None = None
        super().__init__(sites.namespace, number, site, sites.ways[site], clients)
        self.start_agent()

    def _mounted(self) -> Mount:
        mount = super()._mounted()
        mount.expected_logs += STORE_LOGGED
        return mount

    # -- its processes -----------------------------------------------------------------------------------------------

    def prepare(self, schedule: Schedule) -> None:
        super().prepare(schedule)
        for name in (PUBLISHED, LATEST):
            self.clients[0].call(os.mkdir, self.mount.path / schedule.name / name)

    def start(self, schedule: Schedule) -> None:
        super().start(schedule)
        self._lesson = self._learner.start(
            learn,
            Lesson(
                self._sites.namespace.url,
                self._sites.namespace.volume,
                self.site,
                f"/{schedule.name}",
                self.mount.path / schedule.name,
                schedule.began_s + schedule.lasts_s,
                self._sites.namespace.environment(),
            ),
        )

    def collect(self) -> None:
        super().collect()
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            self._learned.append(lesson.result())

    def learned(self) -> list[Learned]:
        """All that was learnt here since the last call."""
        learned, self._learned = self._learned, []
        return learned

    # -- what can happen to it ---------------------------------------------------------------------------------------

    def kill_member(self) -> None:
        self._member_runs = False
        self._member.kill()

    def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent = None

    def start_agent(self) -> None:
        self._agent = self._sites.start_agent(self.site, "--retention-every", "0")

    def mend(self) -> None:
        super().mend()
        self.store.heal()
        if not self._member_runs:
            self._member.start()
            self._member_runs = True
        if self._agent is None:
            self.start_agent()

    def end(self) -> None:
        """Its agent ends, well."""
        if self._agent is not None:
            self._agent.process.terminate()
            assert self._agent.process.wait(END_DEADLINE_S) == 0


SITE_FAULTS: Final[dict[str, Callable[[SiteHost, Schedule], object]]] = {
    **FAULTS,
    "store refuses": lambda host, _: host.store.refuse(),
    "store hangs": lambda host, _: host.store.blackhole(),
    "store is slow": lambda host, _: host.store.delay_ms(SLOW_STORE_MS / 2),
    "member killed": lambda host, _: host.kill_member(),
    "agent killed": lambda host, _: host.kill_agent(),
}


@dataclass
class SiteTrio(Trio[SiteHost]):
    """The three sites."""

    @classmethod
    @contextmanager
    def at(cls, directory: Path, gateway: RadosGateway) -> Iterator[SiteTrio]:
        """Mounted, each with its agent, and the policies set; gone at the end of the block."""
        with ExitStack() as stack:
            sites = stack.enter_context(ThreeSites.started(directory, gateway, "histories", format_options=FORMAT))
            hosts = []
            for number in range(len(SITES)):
                clients = [stack.enter_context(Client.started()) for _ in range(PROCESSES_EACH + 1)]
                host = SiteHost(sites, number, clients[1:], clients[0])
                stack.callback(host.end)
                hosts.append(host)
            for name, policy in POLICIES.items():
                (hosts[0].mount.path / name).mkdir()
                if policy:
                    sites.namespace.command("policy", "set", sites.namespace.url, f"/{name}", *policy)
            yield cls(sites.namespace, hosts, SITE_FAULTS)

    def learned(self) -> list[Learned]:
        """What all learners have to tell of the last schedule."""
        return [learned for host in self.hosts for learned in host.learned()]
