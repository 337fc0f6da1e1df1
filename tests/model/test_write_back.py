"""The write-back of names, explored exhaustively: nothing breaks; with any rule left out, something does.

APOLLOFS_MODEL_STATES sets the bound, as for the protocol of delegations. A world that is larger fails: then nothing
was proven.
"""

from __future__ import annotations

import os

import pytest

from tests.model.write_back import rules, scenarios
from tests.model.write_back.explorer import explore
from tests.model.write_back.state import Scenario

pytestmark = [pytest.mark.model, pytest.mark.slow]

STATES = int(os.environ.get("APOLLOFS_MODEL_STATES", "200000"))

STALE, TORN, LOST, MIDDLE, DEAD, TOLD = "stale", "torn", "lost", "middle", "dead", "told"
REFUSED, RETURNS = "refused", "returns"

WITHOUT: dict[str, tuple[Scenario, str]] = {
    "take_compares": (scenarios.TAKING, STALE),
    "reads_ask": (scenarios.SHARING, STALE),
    "takes_ask": (scenarios.ALONG, STALE),
    "held_meanwhile": (scenarios.TWO_AT_ONCE, TORN),
    "guard": (scenarios.BOTH_HOLD, STALE),
    "queue_first": (scenarios.SHARING, REFUSED),
    "flag_first": (scenarios.SHARING, REFUSED),
    "no_claim_while_sharing": (scenarios.SHARING, REFUSED),
    "share_again": (scenarios.TWO_CLAIMS, RETURNS),
    "land": (scenarios.SHARING, REFUSED),
    "claim_number": (scenarios.TWO_CLAIMS, REFUSED),
    "shared_at_birth": (scenarios.BIRTH, REFUSED),
    "turn_guard": (scenarios.TURN_READ, STALE),
    "turn_after_keys": (scenarios.TURN_AGAIN, REFUSED),
    "turn_shared": (scenarios.BOTH_TURNS, REFUSED),
    "turn_own": (scenarios.TURNS, STALE),
    "turn_landing": (scenarios.TURN_LANDS, REFUSED),
    "pending": (scenarios.ALONE, LOST),
    "wait_for_queue": (scenarios.CRASH, MIDDLE),
    "read_after_queue": (scenarios.ALONE, STALE),
    "queued_is_newest": (scenarios.ALONE, STALE),
    "in_order": (scenarios.CRASH, MIDDLE),
    "one_slot": (scenarios.LOST_REPLIES, LOST),
    "once": (scenarios.LOST_REPLIES, LOST),
    "fence": (scenarios.LAPSES, DEAD),
    "unlearn": (scenarios.ERRORS, TOLD),
    "proven": (scenarios.LAPSES, STALE),
    "queue_with_session": (scenarios.LAPSES, REFUSED),
}
"""For each rule a world in which its absence shows, and the invariant that breaks."""


def test_every_rule_is_needed_somewhere() -> None:
    assert WITHOUT.keys() == rules.RULES.keys()


@pytest.mark.parametrize("world", scenarios.QUICK, ids=lambda world: world.name)
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
    found = explore(scenarios.TAKING, "take_compares")
    assert found.history == (
        "A answers: write 1",
        "B wants to read name 0",
        "B asks for name 0, to take directory 0",
        "etcd reads <nothing> for B, and delegates",
        "B has read <nothing>",
    )
    assert "stale: a read shows what was replaced" in str(found)
