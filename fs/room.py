"""The one bound over everything that is cached on the node's disk, and who leaves when it is reached.

Rules
1. What comes in is on *probation*; only what is used again later is *kept*. Who leaves comes from probation first, so
   reading once through more than fits takes nothing away from what is used again and again.
2. Among each, least recently used first. What is *held* (open, or pinned) counts, and never leaves.
3. What another mount of the node uses can't be removed here: it is counted again, as just used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

AGAIN_AFTER_S = 2.0
"""Uses closer together are one: a program reads a file in many calls."""
KEPT_SHARE = 0.8
"""Part of the bound that what is kept may take; the rest is for what is new."""


class Shelf(Protocol):
    """One of the caches: what a key stands for."""

    def forget(self, key: Any) -> None:
        """The key is about to leave; no checkpoint."""
        ...

    def came_back(self, key: Any, size_bytes: int) -> None:
        """It could not be removed: `Room.add` it again. No checkpoint."""
        ...

    def remove(self, keys: Sequence[Any]) -> Sequence[Any]:
        """Delete what the keys stand for; those that are in use elsewhere, and stay. Blocks. Raises OSError."""
        ...


@dataclass(slots=True)
class _Entry:
    shelf: Shelf
    size_bytes: int
    entered_s: float
    kept: bool = False
    holds: int = 0


@dataclass(frozen=True, slots=True)
class Victim:
    """Who has to leave: the room counts it no more."""

    shelf: Shelf
    key: Hashable
    size_bytes: int


class Room:
    """Sizes by key. Not for threads, but for `remove`."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._probation: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._kept: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._held: dict[Hashable, _Entry] = {}
        self._kept_bytes = 0
        self.is_pinned: Callable[[Any], bool] = lambda key: False
        """Whether some mount's user wants it kept. May ask the disk: for threads."""

    def __contains__(self, key: Hashable) -> bool:
        return self._entry(key) is not None

    def keys_of(self, shelf: Shelf) -> list[Any]:
        """What is counted of one cache."""
        parts = (self._probation, self._kept, self._held)
        return [key for part in parts for key, entry in part.items() if entry.shelf is shelf]

    def size_of(self, key: Hashable) -> int:
        found = self._entry(key)
        return found.size_bytes if found is not None else 0

    def add(self, shelf: Shelf, key: Hashable, size_bytes: int) -> None:
        """It is there, or will be in a moment, and takes `size_bytes`; it is now the most recently used."""
        found = self._entry(key)
        if found is None:
            self._probation[key] = _Entry(shelf, size_bytes, trio.current_time())
            self.bytes += size_bytes
            return
        self.grow(key, size_bytes - found.size_bytes)
        self._use(key, found)

    def grow(self, key: Hashable, size_bytes: int) -> None:
        """It takes so much more; nothing if it is not there."""
        found = self._entry(key)
        if found is not None:
            found.size_bytes += size_bytes
            self.bytes += size_bytes
            if key in self._kept:
                self._kept_bytes += size_bytes

    def use(self, key: Hashable) -> None:
        """It was read."""
        found = self._entry(key)
        if found is not None:
            self._use(key, found)

    def _use(self, key: Hashable, entry: _Entry) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
        elif key in self._probation:
            if trio.current_time() - entry.entered_s >= AGAIN_AFTER_S:
                self._keep(key, self._probation.pop(key))
            else:
                self._probation.move_to_end(key)

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        entry.kept = True
        self._kept[key] = entry
        self._kept_bytes += entry.size_bytes
        while self._kept_bytes > KEPT_SHARE * self.bytes_max and len(self._kept) > 1:
            oldest, demoted = self._kept.popitem(last=False)
            self._kept_bytes -= demoted.size_bytes
            demoted.kept, demoted.entered_s = False, trio.current_time()
            self._probation[oldest] = demoted

    def hold(self, key: Hashable) -> None:
        """It may not leave until `let_go` was called as often. Nothing if it is not there."""
        found = self._entry(key)
        if found is None:
            return
        found.holds += 1
        if key not in self._held:
            self._use(key, found)
            if self._kept.pop(key, None) is not None:
                self._kept_bytes -= found.size_bytes
            self._probation.pop(key, None)
            self._held[key] = found

    def is_held(self, key: Hashable) -> bool:
        return key in self._held

    def let_go(self, key: Hashable) -> None:
        found = self._held.get(key)
        if found is None:
            return
        found.holds -= 1
        if not found.holds:
            del self._held[key]
            if found.kept:
                self._keep(key, found)
            else:
                self._probation[key] = found

    def drop(self, key: Hashable) -> None:
        """It is there no more."""
        for part in (self._probation, self._kept, self._held):
            found = part.pop(key, None)
            if found is not None:
                self.bytes -= found.size_bytes
                self._kept_bytes -= found.size_bytes if part is self._kept else 0

    def give_up(self, bytes_max: int | None = None) -> list[Victim]:
        """Forget who has to leave until at most `bytes_max` bytes (None: the bound) are left, if that can be; what they
        stand for is the caller's to `remove`."""
        limit = self.bytes_max if bytes_max is None else max(0, bytes_max)
        victims = []
        while self.bytes > limit and (self._probation or self._kept):
            key = next(iter(self._probation or self._kept))
            entry = self._entry(key)
            assert entry is not None
            victims.append(Victim(entry.shelf, key, entry.size_bytes))
            self.drop(key)
            entry.shelf.forget(key)
        return victims

    async def clear_out(
        self, victims: Sequence[Victim], threads: trio.CapacityLimiter, warn: Callable[[str], None]
    ) -> None:
        """Delete what they stand for, in a thread; those that could not be removed are there again. Raises nothing."""
        if not victims:
            return
        try:
            self.came_back(await trio.to_thread.run_sync(self.remove, victims, limiter=threads))
        except OSError as exc:
            warn(f"files can't be deleted: {exc}")

    def came_back(self, victims: Sequence[Victim]) -> None:
        """They could not be removed: another mount uses them."""
        for victim in victims:
            victim.shelf.came_back(victim.key, victim.size_bytes)

    def _entry(self, key: Hashable) -> _Entry | None:
        return self._probation.get(key) or self._kept.get(key) or self._held.get(key)

    def remove(self, victims: Sequence[Victim]) -> list[Victim]:
        """Delete what they stand for; those that stay because they are in use or pinned. For threads: blocks. Raises
        OSError."""
        stayed = [victim for victim in victims if self.is_pinned(victim.key)]
        shelves: dict[int, list[Victim]] = {}
        for victim in victims:
            if victim not in stayed:
                shelves.setdefault(id(victim.shelf), []).append(victim)
        for group in shelves.values():
            left = set(group[0].shelf.remove([victim.key for victim in group]))
            stayed += [victim for victim in group if victim.key in left]
        return stayed
