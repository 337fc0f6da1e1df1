"""What a run of retention reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from apollofs.fs.retention.verdicts import Verdict

SHOWN_MAX = 1000
ERRORS_MAX = 100


@dataclass(frozen=True, slots=True)
class Line:
    """One checkpoint and what becomes of it."""

    path: str
    """Of its first name."""
    verdict: Verdict


@dataclass(slots=True)
class RetentionReport:
    """Complete up to the moment at which the run ended."""

    directories: int = 0
    """With checkpoints in them."""
    removed: int = 0
    """Checkpoints; in a dry run what would be removed."""
    removed_bytes: int = 0
    removed_files: int = 0
    brought_back: int = 0
    """Somebody opened a file of it while it was about to be removed."""
    kept: int = 0
    kept_by_reason: dict[str, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    """The first of all checkpoints."""
    lacking_bytes: int = 0
    """By which less is free than a policy asks for, when all was done."""
    errors: list[str] = field(default_factory=list)
    """What went wrong; what is concerned stays for the next run."""

    def tell(self, path: str, verdict: Verdict) -> None:
        if not verdict.goes:
            self.kept += 1
            self.kept_by_reason[verdict.why] = self.kept_by_reason.get(verdict.why, 0) + 1
        if len(self.lines) < SHOWN_MAX:
            self.lines.append(Line(path, verdict))

    def fail(self, what: str) -> None:
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(what)
