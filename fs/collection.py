"""What a run of the collector is asked to do, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

KEPT_SHOWN_MAX = 100


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How garbage is collected."""

    grace_s: float = 3600.0
    """What was dropped less than this ago stays: it can be restored, and old readers get its bytes."""
    ops_per_s: float = 0.0
    """Bound of the objects deleted, and of pages listed, in a second; 0: none."""
    dry_run: bool = False
    """Ask and report, remove nothing."""
    uploads: bool = True
    """Look for uploads of ended sessions that were never committed, too: reads every name, lists every object."""
    pack_used_min: float = 1 / 3
    """Objects that small files share are rewritten when less than this part of them is still used; 0: never. Reads
    every name too."""
    answer_wait_s: float = 30.0
    """A mount that lives and has not answered in this time keeps what it was asked about."""
    batch_max: int = 500
    """Tombstones that are dealt with at once; in memory too."""
    candidates_max: int = 200_000
    """Uploaded blobs that are held in memory, to be looked for among all names."""


@dataclass(slots=True)
class Removed:
    """Counts of one kind of garbage; in a dry run of what would be removed."""

    blobs: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Rewritten:
    """Shared blobs that were mostly dead; in a dry run those that would be rewritten. They go with their tombstones."""

    blobs: int = 0
    bytes: int = 0
    """Of these blobs that were still used, and so were copied."""
    files: int = 0
    """That refer to a new blob now."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A tombstone that was past its grace and stays."""

    ino: int
    name: bytes
    """The last name, of an unlinked inode."""
    why: str


@dataclass(slots=True)
class CollectReport:
    """What a run has done. Complete up to the moment at which it was ended."""

    tombstones: int = 0
    """Removed, or would be."""
    dropped: Removed = field(default_factory=Removed)
    """Blobs of unlinked or changed files."""
    shared_blobs: int = 0
    """Blobs that only lost one of those that refer to them."""
    uploads: Removed = field(default_factory=Removed)
    """Blobs that were uploaded and never committed."""
    rewritten: Rewritten = field(default_factory=Rewritten)
    young: int = 0
    """Tombstones within their grace."""
    young_uploads: int = 0
    """Blobs nobody refers to whose objects are younger than the grace."""
    kept: list[Kept] = field(default_factory=list)
    """The first of those that stay."""
    kept_by_reason: dict[str, int] = field(default_factory=dict)
    silent_mounts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """What went wrong; what is concerned stays for the next run."""

    def keep(self, ino: int, name: bytes, reason: str, detail: str = "") -> None:
        self.kept_by_reason[reason] = self.kept_by_reason.get(reason, 0) + 1
        if len(self.kept) < KEPT_SHOWN_MAX:
            self.kept.append(Kept(ino, name, f"{reason} {detail}".strip()))

    def fail(self, what: str) -> None:
        if len(self.errors) < KEPT_SHOWN_MAX:
            self.errors.append(what)
