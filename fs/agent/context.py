"""What the duties of an elected agent share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.agent.backlog import Backlog
from apollofs.fs.agent.rates import Progress
from apollofs.fs.agent.state import AgentState
from apollofs.fs.blob_copies import CopyLimits
from apollofs.fs.blobs import BlobSource
from apollofs.fs.config import check_bounds
from apollofs.fs.known_copies import KnownCopies
from apollofs.metadata.changes.archiver import ArchiveOptions
from apollofs.metadata.changes.compaction import CompactionOptions
from apollofs.metadata.keys import Keys
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import MountRecord, SiteRecord, Superblock
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.session import Session
from apollofs.metadata.store import Store


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How much an agent may do."""

    bytes_per_s: int = 0
    """Bound of what is copied to this site; 0: none."""
    workers: int = 4
    """Batches of up to 30 files that are copied side by side."""
    blocks_in_memory: int = 16
    """And a quarter as many of what readers wait for."""
    gc_every_s: float = 3600.0
    """Between two runs of the collector; 0: never."""
    gc_grace_s: float = 3600.0
    uploads_every_s: float = 86_400.0
    """Between two searches for uploads that were never committed, which read every name."""
    retention_every_s: float = 600.0
    """Between two runs of checkpoint retention; 0: never."""
    retention_ops_per_s: float = 200.0
    """Bound of the names that those remove in a second; 0: none."""
    lease_ttl_s: int = 15
    """A silent agent's place is taken by the next candidate after this."""
    archive: ArchiveOptions | None = None
    """How the change log is archived; None: it is not."""
    compaction: CompactionOptions | None = None
    """How etcd is compacted behind the archive; None: it is not."""

    def __post_init__(self) -> None:
        check_bounds("rate", self.bytes_per_s, 0, 1 << 50)
        check_bounds("workers", self.workers, 1, 64)
        check_bounds("blocks-in-memory", self.blocks_in_memory, 1, 1024)
        check_bounds("gc-every", self.gc_every_s, 0, 366 * 86_400)
        check_bounds("gc-grace", self.gc_grace_s, 0, 366 * 86_400)
        check_bounds("retention-every", self.retention_every_s, 0, 366 * 86_400)
        check_bounds("retention-rate", self.retention_ops_per_s, 0, 1e6)
        check_bounds("lease-ttl", self.lease_ttl_s, 2, 600)


@dataclass(slots=True)
class LivePolicies:
    """All policies of the volume, as `feed.follow_policies` sees them; `changed` is set when they have. Until `known`
    is set there may be some: what the journal tells must not be passed over, as nobody would look at it again."""

    by_number: dict[int, Policy] = field(default_factory=dict)
    revisions: dict[int, int] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    known: trio.Event = field(default_factory=trio.Event)

    def changed_now(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def of(self, number: int) -> Policy | None:
        return self.by_number.get(number) if number else None


@dataclass(frozen=True, slots=True)
class AgentContext:
    """One term of office. `state` is what was found in etcd at its beginning, and is kept up to date."""

    store: Store
    stores: BlobStoreOptions
    keys: Keys
    superblock: Superblock
    site: SiteRecord
    sites: tuple[int, ...]
    """Ids of all sites."""
    session: Session
    record: MountRecord
    source: BlobSource
    replicas: Replicas
    known_copies: KnownCopies
    """What `source` goes by."""
    options: AgentOptions
    state: AgentState
    progress: Progress
    limits: CopyLimits
    first_limits: CopyLimits
    """Of what readers wait for."""
    backlog: Backlog = field(default_factory=Backlog)
    policies: LivePolicies = field(default_factory=LivePolicies)

    def counters(self) -> Mapping[str, Mapping[str, float]]:
        """For metrics."""
        return {"agent": self.progress.counters(self.backlog)}
