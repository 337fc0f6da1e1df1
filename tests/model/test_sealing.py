"""Seals, explored exhaustively: no mount, and no kernel, answers from a tree that was sealed and then changed, and
unsealing comes to its end whoever is cut off. Each rule is needed."""

from __future__ import annotations

import pytest

from tests.model.sealing import RULES, Sealing
from tests.model.walk import walk

pytestmark = pytest.mark.model


def test_nothing_old_is_answered_and_unsealing_ends() -> None:
    found = walk(Sealing(1))
    assert not found.broken, str(found)
    assert found.states > 1000


@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_is_needed(rule: str) -> None:
    found = walk(Sealing(1, frozenset({rule})))
    assert found.kind == "stale", f"without {rule!r} ({RULES[rule]}) {found}"
