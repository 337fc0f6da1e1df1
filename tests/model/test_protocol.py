"""The delegation and fencing protocol, explored exhaustively: nothing breaks; with any rule left out, something does.

APOLLOFS_MODEL_STATES=3000000 explores larger worlds too, of up to that many states each. A world that is larger than
the bound fails: then nothing was proven.
"""

from __future__ import annotations

import os

import pytest

from tests.model.protocol import rules, scenarios
from tests.model.protocol.explorer import Found, TooManyStates, explore
from tests.model.protocol.state import Scenario

pytestmark = [pytest.mark.model, pytest.mark.slow]

STATES_QUICK = 200_000
STATES = int(os.environ.get("APOLLOFS_MODEL_STATES", str(STATES_QUICK)))
WORLDS = scenarios.QUICK if STATES <= STATES_QUICK else scenarios.QUICK + scenarios.DEEP

STALE, DEAD, ONCE, TOLD, EXCLUSIVE, LOCK, RETURNS = "stale", "dead", "once", "told", "exclusive", "lock", "returns"

WITHOUT: dict[str, tuple[Scenario, str]] = {
    "writers_first": (scenarios.WAITING, RETURNS),
    "own_claim": (scenarios.BOTH_WAIT, RETURNS),
    "guard": (scenarios.DELAYS, STALE),
    "cache_before_key": (scenarios.WAITING, STALE),
    "no_take_while_returning": (scenarios.DELAYS, STALE),
    "no_take_at_birth": (scenarios.BIRTH, STALE),
    "poison": (scenarios.WAITING, STALE),
    "proven": (scenarios.LAPSES, STALE),
    "proof_from_sending": (scenarios.LAPSES, STALE),
    "drop_with_session": (scenarios.LAPSES, STALE),
    "session_of_reply": (scenarios.LAPSES, STALE),
    "pending": (scenarios.DELAYS, STALE),
    "own_write": (scenarios.DELAYS, STALE),
    "own_write_while_taking": (scenarios.DELAYS, STALE),
    "doubt": (scenarios.DEADLINES, STALE),
    "settle": (scenarios.DEADLINES, STALE),
    "held_since": (scenarios.COUNTS, STALE),
    "newest": (scenarios.LATE_READS, STALE),
    "fence": (scenarios.LOCKS, DEAD),
    "once": (scenarios.LOST_REPLIES, ONCE),
    "lost_in_doubt": (scenarios.LOST_REPLIES, TOLD),
    "batch_apart": (scenarios.SAME_NAME, EXCLUSIVE),
    "batch_unknown": (scenarios.BATCHES, TOLD),
    "lock_lease": (scenarios.LOCKS, RETURNS),
    "lock_session": (scenarios.LOCKS, LOCK),
    "hearing": (scenarios.DEAF, RETURNS),
    "kernel_before_key": (scenarios.KERNEL, STALE),
    "kernel_held": (scenarios.KERNEL, STALE),
    "kernel_proven": (scenarios.KERNEL, STALE),
    "kernel_receipts": (scenarios.KERNEL, STALE),
    "hurry": (scenarios.BOTH_CHANGE, RETURNS),
}
"""For each rule a world in which its absence shows, and the invariant that breaks."""


def test_every_rule_is_needed_somewhere() -> None:
    assert WITHOUT.keys() == rules.RULES.keys()


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_with_all_rules_nothing_is_broken(world: Scenario) -> None:
    found = explore(world, states_max=STATES)
    assert not found.broken, str(found)


@pytest.mark.parametrize("rule", WITHOUT)
def test_without_a_rule_the_explorer_finds_what_it_is_for(rule: str) -> None:
    world, kind = WITHOUT[rule]
    found = explore(world, rule, states_max=STATES)
    assert found.kind == kind, str(found)
    assert found.history, "the first state is broken already"


def test_the_history_is_the_shortest_and_reads_like_one() -> None:
    found = explore(scenarios.WAITING, "poison")
    assert found.history == (
        "A asks for name 0 of directory 0, to take its group",
        "etcd reads version 0 of name 0 of directory 0 for A, and delegates its group",
        "B sends: write 1",
        "etcd refuses B's transaction: others hold",
        "B will wait",
        "etcd notes that B waits, and tells it the holders",
        "etcd puts B's notices",
        "A hears that directory 0 is recalled",
        "A hears version 0 of name 0 of directory 0",
        "etcd deletes A's key of directory 0",
        "B sees that all is free, and sends again",
        "etcd applies for B: write 1",
    )
    assert "stale: A answers" in str(found)


def test_what_is_larger_than_the_bound_proves_nothing() -> None:
    with pytest.raises(TooManyStates):
        explore(scenarios.DELAYS, states_max=100)


def test_what_is_found_says_how_much_was_walked() -> None:
    found = explore(scenarios.SAME_NAME)
    assert found == Found(found.states, "", ())
    assert str(found) == f"{found.states} states: nothing is broken"
