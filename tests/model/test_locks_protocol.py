"""The protocol of locks, explored exhaustively: with all rules nothing breaks; without any of them something does."""

from __future__ import annotations

import pytest

from apollofs.metadata.lock_records import RANGE_END, Lock, LockType
from tests.model.locks.explorer import explore
from tests.model.locks.state import Call, Scenario
from tests.model.locks.world import RULES

pytestmark = [pytest.mark.model, pytest.mark.slow]

UNLOCK = Call(None)


def calls(mount: int, owner: int, *wanted: str) -> tuple[Call, ...]:
    """`x01` locks bytes 0 to 1 exclusively, `s` shared, `X` the whole file exclusively; with a `?` it may be
    interrupted; `-` unlocks everything."""
    made: list[Call] = []
    for text in wanted:
        if text == "-":
            made.append(UNLOCK)
            continue
        type_ = LockType.SHARED if text[0] == "s" else LockType.EXCLUSIVE
        start, end = (0, RANGE_END) if text[0] == "X" else (int(text[1]), int(text[2]))
        made.append(Call(Lock(mount, owner, start, end, type_, 0), may_leave=text.endswith("?")))
    return tuple(made)


IN_TURN = Scenario(
    "three mounts lock and unlock one file, one of them may be interrupted",
    ((calls(0, 0, "x00", "-", "x00", "-"),), (calls(1, 0, "x00?", "-"),), (calls(2, 0, "s00", "-"),)),
    alone=False,
)
ALONE = Scenario(
    "two processes of one mount, and one of another",
    ((calls(0, 0, "x00", "-", "s00", "-"), calls(0, 1, "x00", "-")), (calls(1, 0, "x00", "-"),)),
)
ALONE_IN_TURN = Scenario(
    "two mounts that both like to decide alone, again and again",
    ((calls(0, 0, "x00", "-", "x00", "-", "s00", "-"),), (calls(1, 0, "x00?", "-", "x00", "-"),)),
)
PASSING = Scenario(
    "one holds a byte that the next waits for, passes it and who stands behind it; the next leaves",
    ((calls(0, 0, "x00", "x22", "-"),), (calls(1, 0, "x01?", "-"),), (calls(2, 0, "x12", "-"),)),
    alone=False,
)
OWN_STRAY = Scenario(
    "as PASSING, but the one who leaves and the one behind are of one mount",
    ((calls(0, 0, "x00", "x22", "-"),), (calls(1, 0, "x01?", "-"), calls(1, 1, "x12", "-"))),
    alone=False,
)
WEAKER = Scenario(
    "one makes its lock shared and then waits for a reader of the same bytes",
    ((calls(0, 0, "x00", "s01", "x33", "-"),), (calls(1, 0, "x11", "-"),), (calls(2, 0, "x33", "s00", "-"),)),
    alone=False,
)
TURNS = Scenario(
    "two processes of one mount, and one of another; the first two pass the file on to each other first",
    ((calls(0, 0, "X", "-", "X", "-"), calls(0, 1, "X?", "-")), (calls(1, 0, "s00", "-"),)),
    alone=False,
)
BYTES = Scenario(
    "one process holds a byte that another of its mount waits for, one of another mount the next byte",
    ((calls(0, 0, "x00", "-"), calls(0, 1, "x01", "-")), (calls(1, 0, "x11", "-"),)),
    alone=False,
)
WORLDS = (IN_TURN, ALONE, ALONE_IN_TURN, PASSING, OWN_STRAY, WEAKER, TURNS, BYTES)

WITHOUT = {
    "guard": (ALONE, "exclusive"),
    "alone_excludes": (ALONE, "exclusive"),
    "tell_held": (ALONE, "exclusive"),
    "tell_waiters": (ALONE, "exclusive"),
    "notice": (ALONE, "returns"),
    "passed_over": (PASSING, "exclusive"),
    "picture_after_strays": (OWN_STRAY, "exclusive"),
    "weakens": (WEAKER, "returns"),
    "turn_excludes": (BYTES, "exclusive"),
    "turn_ends": (TURNS, "returns"),
}
"""For each rule a world in which its absence shows, and what breaks."""


def test_every_rule_is_needed_somewhere() -> None:
    assert WITHOUT.keys() == RULES.keys()


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_with_all_rules_nothing_is_broken(world: Scenario) -> None:
    found = explore(world)
    assert not found.broken, str(found)


@pytest.mark.parametrize("rule", WITHOUT)
def test_without_a_rule_something_is(rule: str) -> None:
    world, kind = WITHOUT[rule]
    found = explore(world, rule)
    assert found.kind == kind, str(found)
