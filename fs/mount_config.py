"""The configuration of one mount's daemon, as the command line makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from apollofs.fs.config import BodyConfig, SessionConfig, check_bounds
from apollofs.fs.meta_url import MetaAccess


@dataclass(frozen=True, slots=True)
class MountConfig:
    """All that one mount needs to know; paths are absolute."""

    access: MetaAccess
    mountpoint: str
    site: str
    body: BodyConfig
    runtime_dir: str
    session: SessionConfig = field(default_factory=SessionConfig)
    read_only: bool = False
    allow_other: bool = False
    kernel_options: tuple[str, ...] = ()
    version: str = ""
    blob_ca_file: str | None = None
    """PEM file of the authority behind the S3 endpoints; None: the system's."""
    guard: bool = False
    """Whether a process beside the daemon drops pages when the lease ends (`guard.py`)."""
    metrics: tuple[str, int] | None = None
    """Address and port for Prometheus; None: nowhere."""
    start_deadline_s: float = 30.0
    """From the start to the first answer of the mount."""
    stop_deadline_s: float = 150.0
    """For each step of a clean end: unmounting, committing."""

    def __post_init__(self) -> None:
        check_bounds("start-deadline", self.start_deadline_s, 1, 3600)
        check_bounds("stop-deadline", self.stop_deadline_s, 1, 7200)
