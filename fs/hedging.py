"""One read from whichever site answers first: the nearest, then, if that fails or takes too long, the next one as well.

The first answer ends the others. So a store that is down or slow costs one delay, once: after that others are asked
first (`nearness.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from apollofs.fs.errors import BodyError, BodyUnavailable, CorruptBody
from apollofs.fs.nearness import Nearness
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 3
"""A read that takes so many times what was expected gets a rival."""
DELAY_MIN_S, DELAY_MAX_S = 0.15, 3.0
UNKNOWN_S = 0.5
"""What a read from a site that was never measured may take."""

Others = Callable[[], Awaitable[Sequence[int]]]
"""Where else the bytes are; asked once, and only if the first site is in trouble."""


@dataclass(slots=True)
class Hedged(Generic[T]):
    """One read of `size_bytes`. `what` names it in the log."""

    what: str
    size_bytes: int
    read: Callable[[int], Awaitable[T]]
    nearness: Nearness
    _errors: list[Exception] = field(default_factory=list)
    _answer: list[T] = field(default_factory=list)
    _done: trio.Event = field(default_factory=trio.Event)
    """Some attempt has ended; a new one for each wait."""
    _running: dict[int, float] = field(default_factory=dict)
    """Sites that were asked and have not answered, and when."""

    async def run(self, first: int, others: Others) -> T:
        """Raises the gravest error if all fail: what can't be reached may still be there."""
        async with trio.open_nursery() as nursery:
            self._start(nursery, first)
            if not await self._wait(self._delay_s(first)):
                rest = [site for site in await others() if site != first]
                for site in rest:
                    self._start(nursery, site)
                    if await self._wait(self._delay_s(site)):
                        break
                while not self._answer and self._running:
                    await self._wait(float("inf"))
            nursery.cancel_scope.cancel()
        if not self._answer:
            raise self._gravest()
        self._judge_losers()
        return self._answer[0]

    def _start(self, nursery: trio.Nursery, site: int) -> None:
        self._running[site] = trio.current_time()
        nursery.start_soon(self._attempt, site)

    async def _wait(self, delay_s: float) -> bool:
        """Until there is an answer: True; False when nobody is left who could give one, or after the delay."""
        with trio.move_on_after(delay_s):
            while not self._answer and self._running:
                self._done = trio.Event()
                await self._done.wait()
                if self._errors and delay_s < float("inf"):
                    break
        return bool(self._answer)

    def _delay_s(self, site: int) -> float:
        expected_s = self.nearness.expected_s(site, self.size_bytes) or UNKNOWN_S
        return min(max(PATIENCE * expected_s, DELAY_MIN_S), DELAY_MAX_S)

    async def _attempt(self, site: int) -> None:
        began = trio.current_time()
        try:
            found = await self.read(site)
        except (BodyError, UserError, MetadataError) as exc:
            self._errors.append(exc)
            if isinstance(exc, CorruptBody):
                log.warning("%s is damaged at site %d: %s", self.what, site, exc)
            else:
                self.nearness.troubled(site, str(exc))
        else:
            self.nearness.answered(site, trio.current_time() - began, self.size_bytes)
            self._answer.append(found)
        self._running.pop(site, None)
        self._done.set()

    def _judge_losers(self) -> None:
        """Who was asked first, and has not answered when another had."""
        now = trio.current_time()
        for site, since in self._running.items():
            if now - since > self._delay_s(site):
                self.nearness.troubled(site, f"no answer in {now - since:.2f} s")

    def _gravest(self) -> Exception:
        for exc in self._errors:
            if isinstance(exc, BodyUnavailable):
                return exc
        for exc in self._errors:
            if isinstance(exc, CorruptBody):
                return exc
        return self._errors[0]
