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
    _errors: dict[int, Exception] = field(default_factory=dict)
    _answer: list[T] = field(default_factory=list)
    _done: trio.Event = field(default_factory=trio.Event)
    """Some attempt has ended; a new one for each wait."""
    _running: dict[int, float] = field(default_factory=dict)
    """Sites that were asked and have not answered, and when."""
    _slow: set[int] = field(default_factory=set)
    """Sites beside which another was asked."""

    async def run(self, first: int, others: Others) -> T:
        """Raises the gravest error if all fail: what can't be reached may still be there."""
        async with trio.open_nursery() as nursery:
            self._start(nursery, first)
            if not await self._answers(first):
                for site in [site for site in await others() if site != first]:
                    self._start(nursery, site)
                    if await self._answers(site):
                        break
                while not self._answer and self._running:
                    await self._wait(float("inf"))
            nursery.cancel_scope.cancel()
        if not self._answer:
            raise self._gravest()
        self._judge()
        return self._answer[0]

    def _start(self, nursery: trio.Nursery, site: int) -> None:
        self._running[site] = trio.current_time()
        nursery.start_soon(self._attempt, site)

    async def _answers(self, site: int) -> bool:
        """Whether there is an answer before another site is to be asked beside this one."""
        if await self._wait(self._delay_s(site)):
            return True
        if site in self._running:
            self._slow.add(site)
        return False

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
            self._errors[site] = exc
            if not isinstance(exc, CorruptBody):
                self.nearness.troubled(site, str(exc))
        else:
            self.nearness.answered(site, trio.current_time() - began, self.size_bytes)
            self._answer.append(found)
        self._running.pop(site, None)
        self._done.set()

    def _judge(self) -> None:
        """There was an answer: what was wrong with the sites that did not give it."""
        for site, exc in self._errors.items():
            if isinstance(exc, CorruptBody):
                log.warning("%s is damaged or missing at site %d, and was read elsewhere: %s", self.what, site, exc)
        for site in self._slow & self._running.keys():
            self.nearness.troubled(site, f"no answer in {trio.current_time() - self._running[site]:.2f} s")

    def _gravest(self) -> Exception:
        errors = list(self._errors.values())
        for kind in (BodyUnavailable, CorruptBody):
            for exc in errors:
                if isinstance(exc, kind):
                    return exc
        return errors[0]
