"""How fast an agent may copy, and how fast it does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from apollofs.fs.agent.backlog import Backlog

WINDOW_S = 10.0
"""Rates are means over about so long."""


class ByteRate:
    """Turns for so many bytes a second; 0: at once. What was not used is not saved up for longer than a second."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until = self._first_until = 0.0

    async def turn(self, size_bytes: int) -> None:
        """Wait until so many bytes may be moved. Always a checkpoint."""
        now, cost_s = self._cost(size_bytes)
        at = max(self._paid_until, now - 1.0)
        self._paid_until = at + cost_s
        await trio.sleep_until(max(now, at))

    async def first_turn(self, size_bytes: int) -> None:
        """As `turn`, but not behind those who wait there: who comes later makes up for it."""
        now, cost_s = self._cost(size_bytes)
        at = max(self._first_until, now - 1.0)
        self._first_until = at + cost_s
        self._paid_until = max(self._paid_until, now - 1.0) + cost_s
        await trio.sleep_until(max(now, at))

    def _cost(self, size_bytes: int) -> tuple[float, float]:
        return trio.current_time(), size_bytes / self._bytes_per_s if self._bytes_per_s else 0.0


@dataclass(slots=True)
class Progress:
    """What was done since the agent was elected."""

    files: int = 0
    """Whose bodies were looked at."""
    blobs: int = 0
    bytes: int = 0
    """Copied here."""
    late: int = 0
    """Files that had all their copies later than their policy allows."""
    failures: int = 0
    """Attempts that are repeated."""
    given_up: int = 0
    """Files whose bodies are damaged or missing everywhere, and records that do not decode."""
    collections: int = 0
    retired: int = 0
    """Checkpoints that retention has removed."""
    retention_kept: int = 0
    """Checkpoints that it left at its last run."""
    walking: int = 0
    """Number of the policy whose tree is being looked at; 0: none."""
    walked: int = 0
    """Files found in it so far."""
    lag_s: float = 0.0
    """How long after its commit the last file had its copies here."""
    _rate: float = 0.0
    _rate_at: float = 0.0

    def copied(self, blobs: int, size_bytes: int) -> None:
        self.blobs += blobs
        self.bytes += size_bytes
        now = time.monotonic()
        self._rate = self.rate(now) + size_bytes / WINDOW_S
        self._rate_at = now

    def rate(self, now: float | None = None) -> float:
        """Bytes a second, lately."""
        passed_s = (time.monotonic() if now is None else now) - self._rate_at
        return self._rate * max(0.0, 1 - passed_s / WINDOW_S)

    def lag_now_s(self, backlog: Backlog) -> float:
        """How long the oldest open file waits; 0: everything is here."""
        return max(0.0, time.time() - backlog.oldest_ns / 1e9) if len(backlog) else 0.0

    def counters(self, backlog: Backlog) -> Mapping[str, float]:
        return {
            "files": self.files,
            "copied_blobs": self.blobs,
            "copied_bytes": self.bytes,
            "late_files": self.late,
            "failures": self.failures,
            "given_up": self.given_up,
            "sites_away": len(backlog.away),
            "collections": self.collections,
            "retired": self.retired,
            "retention_kept": self.retention_kept,
            "backlog": len(backlog),
            "lag_s": self.lag_now_s(backlog),
            "rate": self.rate(),
        }
