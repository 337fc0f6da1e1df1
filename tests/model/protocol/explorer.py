"""Walks every state of a scenario, breadth first, so that the history it finds is the shortest.

Two kinds of invariants: what a step breaks (`Step.broken`) or what a state's caches would answer (`world.stale`); and
that every call returns: from each state there is a way, without any further misfortune, to one where all live mounts'
programs have ended. Where there is none, operations wait for each other for ever.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from tests.model.protocol import kernel, readers, sessions, writers
from tests.model.protocol.state import Scenario, State, Step
from tests.model.protocol.world import World, stale

STATES_MAX = 400_000


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


def steps(world: World, state: State) -> Iterator[Step]:
    """All that may happen next."""
    for at, mount in enumerate(state.mounts):
        yield from sessions.steps(world, state, at)
        yield from writers.steps(world, state, at)
        if not mount.crashed:
            yield from readers.steps(world, state, at)
            if world.scenario.kernel:
                yield from kernel.steps(world, state, at)


def explore(scenario: Scenario, *off: str, states_max: int = STATES_MAX) -> Found:
    """Walk all states with the rules `off` switched off. Raises TooManyStates."""
    walk = _Walk(World(scenario, frozenset(off)), states_max)
    collects = gc.isenabled()
    gc.disable()  # nothing here is cyclic, and looking through all states again and again takes half of the time
    try:
        return walk.run()
    finally:
        if collects:
            gc.enable()


class _Walk:
    """States are numbered in the order in which they are found; `_came` says from where, and by which step."""

    def __init__(self, world: World, states_max: int) -> None:
        self._world = world
        self._states_max = states_max
        self._numbers: dict[State, int] = {}
        self._came: list[tuple[int, str]] = []
        self._back: list[list[int]] = []
        """For each state those from which it is reached without a misfortune."""
        self._ended: list[int] = []
        self._todo: deque[State] = deque()

    def run(self) -> Found:
        self._add(self._world.first(), -1, "")
        while self._todo:
            state = self._todo.popleft()
            number = self._numbers[state]
            for step in steps(self._world, state):
                if step.broken:
                    return self._found(step.broken, number, step.text)
                known = self._numbers.get(step.state)
                if known is None:
                    known = self._add(step.state, number, step.text)
                    broken = stale(self._world, step.state)
                    if broken:
                        return self._found(f"stale: {broken}", known)
                if not step.misfortune:
                    self._back[known].append(number)
        return self._every_call_returns()

    def _add(self, state: State, came: int, text: str) -> int:
        number = self._numbers[state] = len(self._came)
        if number >= self._states_max:
            raise TooManyStates(f"{self._world.scenario.name}: more than {self._states_max} states")
        self._came.append((came, text))
        self._back.append([])
        self._todo.append(state)
        if all(mount.crashed or self._world.is_through(at, mount) for at, mount in enumerate(state.mounts)):
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
