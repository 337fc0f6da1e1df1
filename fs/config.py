"""The configuration of one mount: frozen, with units and bounds, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
OPERATION_DEADLINE_S = 30.0


class ConfigError(ValueError):
    """A value is out of its bounds; the message names the option, the bound and the value."""


@dataclass(frozen=True, slots=True)
class BodyConfig:
    """How file bodies are read, cached, staged and uploaded."""

    cache_dir: Path
    cache_bytes_max: int = 10 << 30
    """Bound of what is cached of bodies, images and blocks together; what was used least leaves first."""
    disk_free_bytes_min: int = 256 * MIB
    """The cache stops growing, and staging answers ENOSPC, when the disk has less than this left."""
    uploads_max: int = 16
    """How many blocks are uploaded at once at most; how many are is found by trying (`upload_limit.py`)."""
    downloads_max: int = 8
    read_ahead_blocks_max: int | None = None
    """How far ahead of a sequential reader blocks are fetched; None: so far that all downloads are busy."""
    commit_interval_s: float = 5.0
    """An open file that was written is committed at least this often."""
    commit_deadline_s: float = 120.0
    """fsync and close answer EIO when the bodies could not be stored in this time."""
    read_deadline_s: float = 60.0
    """read answers EIO when a block could not be fetched in this time."""

    passthrough: bool = True
    """Whether the kernel may read and write local files behind open files by itself, where it can."""

    def __post_init__(self) -> None:
        check_bounds("cache-size", self.cache_bytes_max, 16 * MIB, 1 << 50)
        check_bounds("uploads", self.uploads_max, 1, 256)
        check_bounds("downloads", self.downloads_max, 1, 256)
        check_bounds("read-ahead", self.read_ahead_blocks_max or 0, 0, 256)
        check_bounds("commit-interval", self.commit_interval_s, 0.1, 3600)
        check_bounds("commit-deadline", self.commit_deadline_s, 1, 3600)
        check_bounds("read-deadline", self.read_deadline_s, 1, 3600)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How long a mount may be silent, and how long an operation may take."""

    lease_ttl_s: int = 15
    """A mount that was not heard of for this long has lost its session, its locks and its right to write."""
    operation_deadline_s: float = OPERATION_DEADLINE_S
    """A metadata operation that could not be done in this time fails with EIO; more than the lease, which it may have
    to wait for. Where etcd can't be reached it fails a moment after the lease has ended (`metadata/patience.py`)."""
    delegations: bool = True
    """Whether directories are cached while nobody else changes them; without, every read asks etcd."""
    entry_cache: bool = True
    """Whether the kernel caches names of these directories too; without, it caches their attributes only."""
    write_back: bool = True
    """Whether names and attributes are answered before etcd has them, where this mount holds them exclusively."""
    slots: int = 32
    """Transactions of this mount that may be in flight at once."""

    def __post_init__(self) -> None:
        check_bounds("lease-ttl", self.lease_ttl_s, 2, 600)
        check_bounds("operation-deadline", self.operation_deadline_s, 1, 1200)
        check_bounds("slots", self.slots, 1, 64)
        check_deadline(self.operation_deadline_s, self.lease_ttl_s)


def default_deadline_s(lease_ttl_s: float) -> float:
    """How long an operation may take where only the lease was given."""
    return max(OPERATION_DEADLINE_S, 2.0 * lease_ttl_s)


def check_deadline(operation_deadline_s: float, lease_ttl_s: float) -> None:
    """Raises ConfigError for an operation that could not wait until the lease of a mount that has died is over."""
    if operation_deadline_s <= lease_ttl_s:
        raise ConfigError(
            f"operation-deadline must be more than lease-ttl ({lease_ttl_s} s), not {operation_deadline_s}: "
            "what a mount that has died held is free only when its lease has ended"
        )


def check_bounds(option: str, value: float, least: float, most: float) -> None:
    """Raises ConfigError unless least <= value <= most."""
    if not least <= value <= most:
        raise ConfigError(f"{option} must be between {least} and {most}, not {value}")
