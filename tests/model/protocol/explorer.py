"""Walks every state of a scenario of the protocol (`tests/model/walk.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.model.protocol import kernel, readers, sessions, writers
from tests.model.protocol.state import Scenario, State, Step
from tests.model.protocol.world import World, stale
from tests.model.walk import STATES_MAX, Found, TooManyStates, walk

__all__ = ["Found", "TooManyStates", "explore"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """The protocol in one world, as `walk` wants it."""

    world: World

    @property
    def name(self) -> str:
        return self.world.scenario.name

    def first(self) -> State:
        return self.world.first()

    def steps(self, state: State) -> Iterator[Step]:
        for at, mount in enumerate(state.mounts):
            yield from sessions.steps(self.world, state, at)
            yield from writers.steps(self.world, state, at)
            if not mount.crashed:
                yield from readers.steps(self.world, state, at)
                if self.world.scenario.kernel:
                    yield from kernel.steps(self.world, state, at)

    def stale(self, state: State) -> str:
        return stale(self.world, state)

    def has_ended(self, state: State) -> bool:
        return all(mount.crashed or self.world.is_through(at, mount) for at, mount in enumerate(state.mounts))


def explore(scenario: Scenario, *off: str, states_max: int = STATES_MAX) -> Found:
    """Walk all states with the rules `off` switched off. Raises TooManyStates."""
    return walk(Protocol(World(scenario, frozenset(off))), states_max)
