"""What a plan says. Bytes, bytes a second and seconds, unless a name says otherwise; nothing is rounded but counts."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.fleet import Fleet, Link
from apollofs.fs.sizing.shapes import Shape


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a site's stores move at its busiest, by cause; `available` is what must be bought for that."""

    save: float
    restore: float
    dataset: float
    load: float
    arriving: float
    leaving: float
    efficiency: float

    @property
    def always(self) -> float:
        """What goes on whether training runs or starts again."""
        return self.dataset + self.load + self.arriving + self.leaving

    @property
    def peak(self) -> float:
        """Saves and restores exclude each other: training does one or the other."""
        return self.always + max(self.save, self.restore)

    @property
    def available(self) -> float:
        """What the stores must give on paper, so that the peak is met every day."""
        return self.peak / self.efficiency

    @property
    def writes(self) -> float:
        return (self.save + self.arriving) / self.efficiency

    @property
    def reads(self) -> float:
        return (self.dataset + self.load + self.leaving + self.restore) / self.efficiency


@dataclass(frozen=True, slots=True)
class Space:
    """What lies at a site once the retention is in its steady state, and what must be there for it."""

    datasets: float
    saves: float
    copies: float
    published: float
    scratch: float
    waiting: float
    fill_limit: float
    raw_factor: float

    @property
    def paper(self) -> float:
        """What policies say must be kept."""
        return self.datasets + self.saves + self.copies + self.published + self.scratch

    @property
    def usable(self) -> float:
        """In practice: also what waits for the clean-up, in stores that must not run full."""
        return (self.paper + self.waiting) / self.fill_limit

    @property
    def raw(self) -> float:
        """Drives: with the parity of the erasure code."""
        return self.usable * self.raw_factor


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How training goes on between failures."""

    best_interval_s: float
    goodput: float
    """The share of time that leads somewhere: without saves, starts, and work that a failure has undone."""


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What one node does at its busiest."""

    save_bytes_s: float
    load_bytes_s: float
    cores: float
    disk_bytes: float


@dataclass(frozen=True, slots=True)
class Machines:
    """What is bought for a site."""

    gpu_racks: int
    servers: int
    storage_racks: int
    gateways: int
    limit: str
    """What the number of servers follows from: space, reads, writes, or the shards of the erasure code."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site."""

    shape: Shape
    throughput: Throughput
    space: Space
    rhythm: Rhythm
    node: NodeLoad
    machines: Machines
    requests_s: float
    """Of S3, at the peak."""

    @property
    def per_rack(self) -> float:
        """Throughput that each GPU rack must be given."""
        return self.throughput.available / self.machines.gpu_racks


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes from one site to another, at the peak and on average."""

    source: str
    target: str
    what: str
    peak: float
    average: float


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """What a link must carry in the direction that needs more, `efficiency` accounted for."""

    link: Link
    flows: tuple[Flow, ...]
    peak: float
    average: float
    publish_s: float
    """Published weights have crossed after this; 0 where none do."""


@dataclass(frozen=True, slots=True)
class EtcdPlan:
    """The metadata of the whole fleet."""

    files: float
    database_bytes: float
    volumes: int
    """Each on an etcd of its own."""
    members: int
    peak_requests_s: float
    average_requests_s: float
    renewals_s: float
    quorum_s: float | None
    """Round trip from the lead site to the member that makes a majority; None where links do not say."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it. `shortfalls`: what the links that were given can't do."""

    fleet: Fleet
    given: Assumptions
    sites: tuple[SitePlan, ...]
    links: tuple[LinkPlan, ...]
    etcd: EtcdPlan
    lead: str
    shortfalls: tuple[str, ...]

    def site(self, name: str) -> SitePlan:
        """The plan of one site, by its name."""
        return next(site for site in self.sites if site.shape.name == name)

    @property
    def gpus(self) -> int:
        return sum(site.shape.site.gpus for site in self.sites)

    @property
    def gpu_racks(self) -> int:
        return sum(site.machines.gpu_racks for site in self.sites)

    @property
    def available(self) -> float:
        """Bytes a second, over all sites."""
        return sum(site.throughput.available for site in self.sites)

    @property
    def paper(self) -> float:
        return sum(site.space.paper for site in self.sites)

    @property
    def usable(self) -> float:
        return sum(site.space.usable for site in self.sites)

    @property
    def raw(self) -> float:
        return sum(site.space.raw for site in self.sites)
