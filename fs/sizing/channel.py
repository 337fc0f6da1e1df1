"""One direction of a link while days are played: published weights go first, other copies take what is left."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from apollofs.fs.sizing.retaining import Kept

TICK_S = 1e-6


@dataclass(slots=True)
class Transfer:
    """One body on its way; `left` counts down."""

    item: Kept
    urgent: bool
    asked_s: float
    left: float


@dataclass(slots=True)
class Channel:
    """A queue that is worked off at a rate while the link is up."""

    source: str
    target: str
    rate_bytes_s: float
    up: bool = True
    version: int = 0
    """Changes with everything that moves the next end; an event made for an older one is void."""
    backlog_peak: float = 0.0
    moving: list[tuple[float, float]] = field(default_factory=list)
    """From when to when bytes went, at the full rate."""
    _now_s: float = 0.0
    _urgent: deque[Transfer] = field(default_factory=deque)
    _bulk: deque[Transfer] = field(default_factory=deque)

    def backlog(self) -> float:
        """Bytes that have not arrived yet."""
        return sum(transfer.left for queue in (self._urgent, self._bulk) for transfer in queue)

    def submit(self, item: Kept, now_s: float, *, urgent: bool) -> None:
        """One more body; the caller has advanced to now."""
        (self._urgent if urgent else self._bulk).append(Transfer(item, urgent, now_s, item.size))
        self.backlog_peak = max(self.backlog_peak, self.backlog())
        self.version += 1

    def switch(self, *, up: bool) -> None:
        """The link goes down, or comes back; what has crossed stays there."""
        self.up = up
        self.version += 1

    def next_end_s(self) -> float:
        """When the next transfer ends if nothing else happens; infinite where nothing moves."""
        first = self._first()
        return self._now_s + first.left / self.rate_bytes_s if first and self.up else math.inf

    def advance(self, now_s: float) -> list[Transfer]:
        """Move bytes until now; what has arrived, in the order of its arrival."""
        budget = (now_s - self._now_s) * self.rate_bytes_s if self.up else 0.0
        arrived = []
        while (first := self._first()) is not None and self.up:
            # what would cross in a microsecond is the rounding of a time: waiting for it might never move the clock
            if first.left > budget + self.rate_bytes_s * TICK_S:
                first.left -= budget
                budget = 0.0
                break
            budget = max(0.0, budget - first.left)
            arrived.append((self._urgent or self._bulk).popleft())
            self.version += 1
        self._moved(self._now_s, now_s - budget / self.rate_bytes_s)
        self._now_s = now_s
        return arrived

    def _moved(self, begin_s: float, end_s: float) -> None:
        if not self.up or end_s <= begin_s:
            return
        if self.moving and begin_s - self.moving[-1][1] <= TICK_S:
            self.moving[-1] = (self.moving[-1][0], end_s)
        else:
            self.moving.append((begin_s, end_s))

    def _first(self) -> Transfer | None:
        queue = self._urgent or self._bulk
        return queue[0] if queue else None
