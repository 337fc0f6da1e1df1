"""Walks every state of a scenario of write-back (`tests/model/walk.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.walk import STATES_MAX, Found, walk
from tests.model.write_back import callers, holder, readers, sessions
from tests.model.write_back.state import Scenario, State, Step
from tests.model.write_back.world import World


class WriteBack(World):
    """The write-back of one world, as `walk` wants it."""

    @property
    def name(self) -> str:
        return self.scenario.name

    def steps(self, state: State) -> Iterator[Step]:
        for at in range(len(state.mounts)):
            yield from sessions.steps(self, state, at)
            yield from callers.steps(self, state, at)
            yield from holder.steps(self, state, at)
            yield from readers.steps(self, state, at)


def explore(scenario: Scenario, *off: str, states_max: int = STATES_MAX) -> Found:
    """Walk all states with the rules `off` switched off. Raises TooManyStates."""
    return walk(WriteBack(scenario, frozenset(off)), states_max)
