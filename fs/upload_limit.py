"""How many blocks a mount uploads at once: as many as make it faster, found by trying.

More at once hide a store's latency and the limit of one connection; too many only take memory, and from a store in
trouble they take what it has left. So the number climbs while more bytes get through for it, comes down where fewer do
as well, and is halved when an upload fails. It moves only while uploads wait for their turn: else it says nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.errors import BodyUnavailable

START = 8
LEAST = 4
"""Trials go no lower, or many small losses would add up; only failures do, and what they took comes back."""
ROUND_S = 0.25
"""A number is tried for so long at least, and for two uploads of each place."""
GAIN = 1.05
"""More at once must be so much faster."""
LOSS = 0.97
"""Fewer at once may be so much slower."""
COLLAPSE = 0.6
"""If so little gets through of what did before, the store is in trouble."""
REST_ROUNDS = 8
"""Rounds between two trials that changed nothing."""


class Climber:
    """The rule, without a clock or a task of its own. `limit` is the number; times are seconds of one clock."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self.limit = min(START, at_most)
        self._trial = 0
        """By how much the number was changed for the round under way."""
        self._rate_before = 0.0
        self._direction = 1
        self._rest = 0
        self._begin_round(0.0)

    def _begin_round(self, now_s: float) -> None:
        self._begun_s = now_s
        self._settling = self.limit
        """Uploads that began before the round did."""
        self._ended = 0
        self._bytes = 0

    def ended(self, now_s: float, size_bytes: int, *, contended: bool) -> None:
        """An upload went well; `contended`: others wait for its place."""
        if not contended:
            self._begin_round(now_s)
        elif self._settling:
            self._settling -= 1
            self._begun_s = now_s
        else:
            self._ended += 1
            self._bytes += size_bytes
            took_s = now_s - self._begun_s
            if self._ended >= 2 * self.limit and took_s >= ROUND_S:
                self._judge(self._bytes / took_s)
                self._begin_round(now_s)

    def failed(self, now_s: float) -> None:
        self.limit = max(1, self.limit // 2)
        self._trial, self._rest, self._rate_before = 0, REST_ROUNDS, 0.0
        self._direction = 1
        self._begin_round(now_s)

    def _judge(self, rate: float) -> None:
        """A round has ended, in which `rate` bytes a second got through."""
        trial, self._trial = self._trial, 0
        if not trial and rate < COLLAPSE * self._rate_before:
            self._move(-max(1, self.limit // 4))
        elif not trial:
            self._rest -= 1
        elif rate >= self._rate_before * (GAIN if trial > 0 else LOSS):
            self._rest = 0
        else:
            self._move(-trial)
            self._direction, self._rest = -self._direction, REST_ROUNDS
            return  # what it was compared with still holds
        self._rate_before = rate
        if self._rest <= 0:
            self._try_another()

    def _try_another(self) -> None:
        if self.limit < min(LEAST, self._at_most):
            self._move(1)
            return
        if not min(LEAST, self._at_most) <= self.limit + self._direction <= self._at_most:
            self._direction, self._rest = -self._direction, REST_ROUNDS
            return
        self._trial = self._move(self._direction * max(1, self.limit // 4))

    def _move(self, by: int) -> int:
        before, self.limit = self.limit, max(1, min(self._at_most, self.limit + by))
        return self.limit - before


class UploadLimit:
    """The places of one mount's uploads."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self._climber = Climber(at_most)
        self._places = trio.CapacityLimiter(self._climber.limit)

    @property
    def now(self) -> int:
        """How many may be under way at the moment."""
        return self._climber.limit

    @asynccontextmanager
    async def place(self, size_bytes: int) -> AsyncIterator[None]:
        """Held while a block of so many bytes is read, hashed and put."""
        async with self._places:
            try:
                yield
            except (BodyUnavailable, BlobStoreError):
                self._climber.failed(trio.current_time())
                self._places.total_tokens = self._climber.limit
                raise
            contended = bool(self._places.statistics().tasks_waiting)
            self._climber.ended(trio.current_time(), size_bytes, contended=contended)
            self._places.total_tokens = self._climber.limit
