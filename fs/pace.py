"""How fast a background job may go: so many operations a second, evenly."""

from __future__ import annotations

import trio


class Pace:
    """`ops_per_s` 0: as fast as they go. Operations that were late are not made up for."""

    def __init__(self, ops_per_s: float) -> None:
        self._interval_s = 1 / ops_per_s if ops_per_s else 0.0
        self._next = 0.0

    async def step(self) -> None:
        """Wait for the turn of one more operation. Always a checkpoint."""
        now = trio.current_time()
        at = max(now, self._next)
        self._next = at + self._interval_s
        await trio.sleep_until(at)
