"""Walks every state of a model, breadth first, so that the history it finds is the shortest.

Two kinds of invariants: what a step breaks (`Step.broken`) or what a state's caches would answer (`Model.stale`); and
that every call returns: from each state there is a way, without any further misfortune, to one that has ended. Where
there is none, operations wait for each other for ever.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

STATES_MAX = 400_000
S = TypeVar("S", bound=Hashable)
S_co = TypeVar("S_co", bound=Hashable, covariant=True)


class Next(Protocol[S_co]):
    """What may happen next. `misfortune`: nobody may count on it. `broken`: the invariant that it breaks, or ""."""

    @property
    def text(self) -> str: ...
    @property
    def state(self) -> S_co: ...
    @property
    def misfortune(self) -> bool: ...
    @property
    def broken(self) -> str: ...


class Model(Protocol[S]):
    """A small world with its rules."""

    @property
    def name(self) -> str: ...

    def first(self) -> S:
        """The state that all begins with."""

    def steps(self, state: S) -> Iterable[Next[S]]:
        """All that may happen next."""

    def stale(self, state: S) -> str:
        """A cached answer that is not true any more, or ""."""

    def has_ended(self, state: S) -> bool:
        """Whether all that live have returned."""


class TooManyStates(Exception):
    """The scenario is larger than the bound: nothing is proven."""


@dataclass(frozen=True, slots=True)
class Found:
    """`broken`: the invariant that is broken, or "". `history`: the steps that lead there."""

    states: int
    broken: str
    history: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The invariant's short name: what stands before the colon."""
        return self.broken.partition(":")[0]

    def __str__(self) -> str:
        steps = "".join(f"\n  {number}. {text}" for number, text in enumerate(self.history, 1))
        return f"{self.states} states: {self.broken or 'nothing is broken'}{steps}"


def walk(model: Model[S], states_max: int = STATES_MAX) -> Found:
    """Walk all states. Raises TooManyStates."""
    walking = _Walk(model, states_max)
    collects = gc.isenabled()
    gc.disable()  # nothing here is cyclic, and looking through all states again and again takes half of the time
    try:
        return walking.run()
    finally:
        if collects:
            gc.enable()


class _Walk(Generic[S]):
    """States are numbered in the order in which they are found; `_came` says from where, and by which step."""

    def __init__(self, model: Model[S], states_max: int) -> None:
        self._model = model
        self._states_max = states_max
        self._numbers: dict[S, int] = {}
        self._came: list[tuple[int, str]] = []
        self._back: list[list[int]] = []
        """For each state those from which it is reached without a misfortune."""
        self._ended: list[int] = []
        self._todo: deque[S] = deque()

    def run(self) -> Found:
        self._add(self._model.first(), -1, "")
        while self._todo:
            state = self._todo.popleft()
            number = self._numbers[state]
            for step in self._model.steps(state):
                if step.broken:
                    return self._found(step.broken, number, step.text)
                known = self._numbers.get(step.state)
                if known is None:
                    known = self._add(step.state, number, step.text)
                    broken = self._model.stale(step.state)
                    if broken:
                        return self._found(f"stale: {broken}", known)
                if not step.misfortune:
                    self._back[known].append(number)
        return self._every_call_returns()

    def _add(self, state: S, came: int, text: str) -> int:
        number = self._numbers[state] = len(self._came)
        if number >= self._states_max:
            raise TooManyStates(f"{self._model.name}: more than {self._states_max} states")
        self._came.append((came, text))
        self._back.append([])
        self._todo.append(state)
        if self._model.has_ended(state):
            self._ended.append(number)
        return number

    def _every_call_returns(self) -> Found:
        returns = bytearray(len(self._came))
        todo = list(self._ended)
        for number in todo:
            returns[number] = 1
        while todo:
            for before in self._back[todo.pop()]:
                if not returns[before]:
                    returns[before] = 1
                    todo.append(before)
        stuck = returns.find(0)
        if stuck < 0:
            return self._found("", -1)
        return self._found("returns: operations wait for ever", stuck)

    def _found(self, broken: str, number: int, last: str = "") -> Found:
        history = [last] if last else []
        while number > 0:
            number, text = self._came[number]
            history.append(text)
        return Found(len(self._came), broken, tuple(reversed(history)))
