"""Walks every state, breadth first: nobody may hold what excludes what another holds, and every call must return."""

from __future__ import annotations

from collections import deque

from apollofs.metadata.lock_ranges import conflict
from tests.model.locks.state import Mount, Scenario
from tests.model.locks.world import World
from tests.model.protocol.explorer import Found, TooManyStates


def explore(scenario: Scenario, *off: str, states_max: int = 200_000) -> Found:
    """Walk all states with the rules `off` switched off. Raises TooManyStates."""
    world = World(scenario, frozenset(off))
    first = world.first()
    numbers, came, back, ended = {first: 0}, [(-1, "")], [list[int]()], list[int]()
    todo = deque([first])
    while todo:
        state = todo.popleft()
        number = numbers[state]
        if _broken(state.mounts):
            return Found(len(numbers), "exclusive: two owners hold what excludes each other", _history(came, number))
        if world.is_over(state):
            ended.append(number)
        for step in world.steps(state):
            known = numbers.get(step.state)
            if known is None:
                known = numbers[step.state] = len(came)
                came.append((number, step.text))
                back.append([])
                todo.append(step.state)
                if known > states_max:
                    raise TooManyStates(f"{scenario.name}: more than {states_max} states")
            if not step.misfortune:
                back[known].append(number)
    stuck = _stuck(back, ended)
    if stuck is not None:
        return Found(len(numbers), "returns: somebody waits for ever", _history(came, stuck))
    return Found(len(numbers), "", ())


def _broken(mounts: tuple[Mount, ...]) -> bool:
    locks = [lock for mount in mounts for lock in mount.held]
    return any(conflict(one, other) for at, one in enumerate(locks) for other in locks[:at])


def _stuck(back: list[list[int]], ended: list[int]) -> int | None:
    """The first state from which there is no way to the end."""
    returns, todo = set(ended), list(ended)
    while todo:
        for before in back[todo.pop()]:
            if before not in returns:
                returns.add(before)
                todo.append(before)
    return next((number for number in range(len(back)) if number not in returns), None)


def _history(came: list[tuple[int, str]], number: int) -> tuple[str, ...]:
    history: list[str] = []
    while number > 0:
        number, text = came[number]
        history.append(text)
    return tuple(reversed(history))
