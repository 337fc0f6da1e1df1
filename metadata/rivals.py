"""Which directories this mount and others change at the same time, so that they had better take turns (`turns.py`).

Pure bookkeeping, by trio's clock. A directory is *contested* once another mount wanted it back to change it, or had it
exclusively, which is had only by who changes it; its mount *competes* for it while it goes on changing it. Who only
reads it, and had to give it back so that this mount could change it, is no rival.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

CHANGES_BEFORE = 8
"""So many changes since it is contested make a mount compete."""
CHANGES_TO_JOIN = 2
"""So few are enough where another mount has a turn already."""
RECENT_S = 1.0
"""A mount that has not changed the directory for so long does not compete any more."""
CALM_S = 2.0
"""What nobody has recalled for so long is not contested any more."""
AWAY_FIRST_S = 0.1
AWAY_MOST_S = 4.0
"""For how long no turn is taken after somebody wanted only to read: longer each time that it happens."""
TOO_LARGE_S = 16.0
CONTESTED_MAX = 1024


@dataclass(slots=True)
class _Contest:
    """`recalled_at`: when another mount was last heard of. `changed_at`: when this mount last wanted to change it.
    `not_before`: until then no turn is taken; `away_s`: how long that was."""

    recalled_at: float
    changes: int = 0
    changed_at: float = 0.0
    not_before: float = 0.0
    away_s: float = 0.0


class Rivals:
    """One mount's."""

    def __init__(self) -> None:
        self._contests: dict[int, _Contest] = {}
        """In the order of their last recall."""

    def recalled(self, group: int) -> None:
        """Another mount wants to change the group, or had it exclusively when this one wanted to."""
        now = trio.current_time()
        contest = self._contests.pop(group, None)
        if contest is None or now > max(contest.recalled_at, contest.changed_at, contest.not_before) + CALM_S:
            contest = _Contest(now)
        contest.recalled_at = now
        self._contests[group] = contest
        if len(self._contests) > CONTESTED_MAX:
            self._contests.pop(next(iter(self._contests)))

    def changes(self, group: int) -> None:
        """This mount wants to change a group that it does not hold exclusively."""
        contest = self._contests.get(group)
        if contest is not None:
            contest.changes += 1
            contest.changed_at = trio.current_time()

    def keeps(self, group: int) -> None:
        """This mount has just had its turn on a group, and changed it."""
        contest = self._contests.get(group)
        if contest is not None:
            contest.changed_at = trio.current_time()

    def read_elsewhere(self, group: int) -> None:
        """A mount that does not compete wants to read what this one holds exclusively."""
        contest = self._contests.get(group)
        if contest is not None:
            now = trio.current_time()
            again = now < contest.not_before + 4 * contest.away_s
            contest.away_s = min(2 * contest.away_s, AWAY_MOST_S) if again else AWAY_FIRST_S
            contest.not_before = now + contest.away_s

    def too_large(self, group: int) -> None:
        """The group can't be read as a whole in one request."""
        contest = self._contests.get(group)
        if contest is not None:
            contest.not_before = trio.current_time() + TOO_LARGE_S

    def competes(self, group: int, *, joins: bool) -> bool:
        """Whether this mount should take a turn before it reads or changes the group; `joins`: because another mount
        has a turn."""
        contest = self._contests.get(group)
        if contest is None or contest.changes < (CHANGES_TO_JOIN if joins else CHANGES_BEFORE):
            return False
        now = trio.current_time()
        return now < contest.changed_at + RECENT_S and (joins or now >= contest.not_before)

    def is_contested(self, group: int) -> bool:
        """Whether another mount changed it lately."""
        contest = self._contests.get(group)
        return contest is not None and trio.current_time() < contest.recalled_at + CALM_S

    def clear(self) -> None:
        self._contests.clear()
