"""How long a mount leaves a directory, or the locks of an inode, alone after somebody else wanted it: longer each time,
where sharing is hot."""

from __future__ import annotations

import trio

FIRST_S = 0.5
MOST_S = 16.0
REMEMBERED_MAX = 4096


class Pauses:
    """The groups that were recalled last. A recall soon after the end of a pause doubles the next one."""

    def __init__(self) -> None:
        self._recalled: dict[int, tuple[float, float]] = {}
        """Until when a group is not taken again, and how long that pause was."""

    def begin(self, group: int) -> None:
        """The group was recalled just now."""
        until, pause_s = self._recalled.pop(group, (0.0, FIRST_S / 2))
        again = trio.current_time() < until + 4 * pause_s
        pause_s = min(2 * pause_s, MOST_S) if again else FIRST_S
        self._recalled[group] = (trio.current_time() + pause_s, pause_s)
        if len(self._recalled) > REMEMBERED_MAX:
            self._recalled.pop(next(iter(self._recalled)))

    def is_over(self, group: int) -> bool:
        """Whether the group may be taken again."""
        pause = self._recalled.get(group)
        return pause is None or trio.current_time() > pause[0]
