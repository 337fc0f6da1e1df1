"""Which directory groups a mount should hold: what it asks for again and again, and others do not change all the time.

A delegation costs a write to take, and whoever changes the directory then has to wait until it is given back. So a
group that was recalled is left alone for a while, longer each time that it happens soon again (`pauses.py`). It is
worth its price all the same if this mount only reads the directory, and had several answers from the delegation for
each mount that had to give one back: then it is taken again at the next request, with the names that were known of it
before, and a reader pays one request for each change instead of one for each of its calls.
"""

from __future__ import annotations

from apollofs.metadata.groups import Group
from apollofs.metadata.keys import Keys
from apollofs.metadata.pauses import Pauses

TOUCHED_MAX = 8192
"""Groups of which it is remembered that they were asked for once."""
ANSWERS_BEFORE = 2
"""So many answers make a delegation worth one recall."""
NAMES_ALONG = 8
"""A group of which more is known is read anew as it is asked for."""
REGAINED_MAX = 256


class Interest:
    """One mount's, in one volume."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._pauses = Pauses()
        self._touched: dict[int, None] = {}
        self._known: dict[int, tuple[bytes, ...]] = {}
        """Of groups that are worth having: the names that were known when they were recalled."""

    def touch(self, group: int) -> bool:
        """The group is asked for: whether it was before."""
        if group in self._touched:
            return True
        self._touched[group] = None
        if len(self._touched) > TOUCHED_MAX:
            self._touched.pop(next(iter(self._touched)))
        return False

    def is_cool(self, group: int) -> bool:
        """Whether the group may be taken: not if it is hot elsewhere."""
        return self._pauses.is_over(group)

    def recalled(self, group: int, held: Group | None, holders: int) -> None:
        """Another mount wants to change a group, of which this one has `held` what is given back now (None: nothing
        yet); so many mounts have to give it back."""
        if held is not None and not held.changed and held.answers >= ANSWERS_BEFORE * holders:
            prefix = self._keys.dentries_of(group)
            names = tuple(key for key in held.known if key.startswith(prefix))
            self._known.pop(group, None)
            self._known[group] = names if len(names) <= NAMES_ALONG else ()
            if len(self._known) > REGAINED_MAX:
                self._known.pop(next(iter(self._known)))
        else:
            self._known.pop(group, None)
            self._pauses.begin(group)

    def names_of(self, group: int) -> tuple[bytes, ...] | None:
        """The keys of the names that were known of a group when it was recalled, if it is worth having again."""
        return self._known.get(group)

    def clear(self) -> None:
        """The session is gone."""
        self._touched.clear()
        self._known.clear()
