"""Which checkpoints stay, and how many that can be at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The newest `last`, and of the others every number that `every` divides (0: none) for `keep_for_s` seconds."""

    last: int
    every: int
    keep_for_s: float

    def most(self, interval_s: float) -> int:
        """The most that it keeps at once of what comes every `interval_s` seconds, each numbered one more."""
        if not self.every:
            return self.last
        aged = math.floor(self.keep_for_s / (interval_s * self.every)) + 1
        # of the newest, at least so many are multiples too
        return self.last + max(0, aged - self.last // self.every)


@dataclass(frozen=True, slots=True)
class Kept:
    """One thing under a policy: its number, when it was complete, its bytes."""

    number: int
    done_s: float
    size: float


def must_keep(items: Iterable[Kept], now_s: float, policy: Policy) -> set[int]:
    """The numbers that stay. The definition; `Shelf` is the same, faster."""
    ordered = sorted(items, key=lambda item: item.number)
    newest = {item.number for item in ordered[-policy.last :]}
    if not policy.every:
        return newest
    return newest | {
        item.number for item in ordered if item.number % policy.every == 0 and now_s - item.done_s <= policy.keep_for_s
    }


class Shelf:
    """Things that come in the order of their numbers and times, and go as the policy says.

    Bounded by `Policy.most`, and by what has come since the last `retire`.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._newest: deque[Kept] = deque()
        self._aging: deque[Kept] = deque()

    def __iter__(self) -> Iterator[Kept]:
        yield from self._aging
        yield from self._newest

    def add(self, item: Kept) -> None:
        """One more, complete."""
        self._newest.append(item)

    def retire(self, now_s: float) -> list[Kept]:
        """Take out what need not stay any more."""
        gone = []
        while len(self._newest) > self._policy.last:
            item = self._newest.popleft()
            if self._policy.every and item.number % self._policy.every == 0:
                self._aging.append(item)
            else:
                gone.append(item)
        while self._aging and now_s - self._aging[0].done_s > self._policy.keep_for_s:
            gone.append(self._aging.popleft())
        return gone
