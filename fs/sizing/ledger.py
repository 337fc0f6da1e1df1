"""What lies at one site while days are played: every byte that is written is there until it is removed.

All sizes are whole bytes, so that nothing is lost to rounding: written == present + removed, always.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from apollofs.fs.sizing.retaining import Kept

KINDS = ("datasets", "scratch", "saves", "copies", "published", "waiting")
"""What bytes are; `waiting` need not stay and is there until a clean-up takes it."""


@dataclass(slots=True)
class Ledger:
    """Bytes by kind. `peak` is the most that was there at once."""

    present: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    written: int = 0
    removed: int = 0
    peak: int = 0
    _waiting: deque[tuple[float, int]] = field(default_factory=deque)

    def total(self) -> int:
        """All bytes that are there."""
        return sum(self.present.values())

    def write(self, kind: str, size: int) -> None:
        """New bytes."""
        self.present[kind] += size
        self.written += size
        self.peak = max(self.peak, self.total())

    def drop(self, kind: str, items: Iterable[Kept], now_s: float) -> None:
        """These need not stay: they wait from now on."""
        for item in items:
            self.present[kind] -= int(item.size)
            self.wait(int(item.size), now_s)

    def write_in_vain(self, size: int, now_s: float) -> None:
        """Bytes that belong to nothing: their writer died."""
        self.write("waiting", size)
        self._waiting.append((now_s, size))

    def wait(self, size: int, now_s: float) -> None:
        """Bytes that were counted elsewhere until now wait for a clean-up."""
        self.present["waiting"] += size
        self._waiting.append((now_s, size))

    def collect(self, now_s: float, grace_s: float) -> None:
        """Remove what has waited for the grace."""
        while self._waiting and now_s - self._waiting[0][0] >= grace_s:
            _, size = self._waiting.popleft()
            self.present["waiting"] -= size
            self.removed += size
