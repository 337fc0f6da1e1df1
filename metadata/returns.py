"""Giving delegations back: first the caches above drop what they have of a group, then its key is deleted."""

from __future__ import annotations

import logging
import time
from typing import Protocol

import trio

from apollofs.metadata.errors import MetadataError, SessionLost
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import Session
from apollofs.metadata.store import Delete, Op

log = logging.getLogger(__name__)
GROUPS_IN_TRANSACTION = 40
RETRY_S = 0.5
NOTED = (Change(Kind.NOTHING),)


class CacheAbove(Protocol):
    """A cache that is filled from delegated groups, above this one: the kernel's."""

    def holds(self, group: int) -> bool:
        """Whether it may have something of a group."""

    async def drop(self, group: int) -> None:
        """On return it has nothing of a group, which is no longer held here. One call at a time for a group."""

    async def drop_all(self) -> None:
        """As `drop`, of all groups."""

    def hurry(self, group: int) -> None:
        """An operation that has locked this directory above waits for others: `drop` must not wait for its lock."""

    def discard(self, group: int) -> None:
        """The directory is gone, or `holds` has said no: forget what was there."""


class NoCacheAbove:
    """Nothing is cached above."""

    def holds(self, group: int) -> bool:
        return False

    async def drop(self, group: int) -> None:
        pass

    async def drop_all(self) -> None:
        pass

    def hurry(self, group: int) -> None:
        pass

    def discard(self, group: int) -> None:
        pass


class Returns:
    """The groups that one mount is giving back. `group in returns` until the deletion of its key is through."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.above: CacheAbove = NoCacheAbove()
        self._asked: dict[int, int] = {}
        """With a number that tells whether it was asked for again."""
        self._since: dict[int, float] = {}
        self._count = 0
        self._dropping: set[int] = set()
        self._ready: dict[int, None] = {}
        self._wakeup = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.returned = 0
        self.spent_s = 0.0
        """From the first asking to the deletion of the key, over all that were returned."""

    def __contains__(self, group: int) -> bool:
        return group in self._asked

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, group: int) -> None:
        """Give a group back, whether or not its key is there. Nothing of it may be handed to the cache above now."""
        self._count += 1
        self._asked[group] = self._count
        self._since.setdefault(group, trio.current_time())
        self._begin(group)

    def clear(self) -> None:
        """The session is gone, and its keys with it."""
        self._asked.clear()
        self._since.clear()
        self._ready.clear()

    async def serve(self, session: Session) -> None:
        """Do what was asked for, until cancelled or the session ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for group in list(self._asked):
                    self._begin(group)
                while session.alive:
                    await self._wakeup.wait()
                    self._wakeup = trio.Event()
                    await self._delete_ready(session)
            finally:
                self._nursery = None
                self._dropping.clear()

    def _begin(self, group: int) -> None:
        if group in self._dropping:
            return
        if not self.above.holds(group):
            self.above.discard(group)
            self._ready[group] = None
            self._wakeup.set()
        elif self._nursery is not None:
            self._dropping.add(group)
            self._nursery.start_soon(self._drop, group)

    async def _drop(self, group: int) -> None:
        while True:
            try:
                await self.above.drop(group)
                break
            except Exception:
                log.exception("a delegation can't be given back yet")
                await trio.sleep(RETRY_S)
        self._dropping.discard(group)
        self._ready[group] = None
        self._wakeup.set()

    async def _delete_ready(self, session: Session) -> None:
        """Delete the keys of what the cache above has dropped, several in one transaction."""
        while self._ready:
            groups = list(self._ready)[:GROUPS_IN_TRANSACTION]
            asked = {group: self._asked.get(group) for group in groups}
            for group in groups:
                del self._ready[group]
            deletes: list[Op] = []
            for group in groups:
                deletes.append(Delete(self._keys.delegation(group, session.number)))
                deletes.append(Delete(self._keys.recall(session.number, group)))
            try:
                await session.commit((), deletes, NOTED, time_ns=time.time_ns())
            except SessionLost:
                return
            except MetadataError as exc:
                log.info("delegations not given back yet: %s", exc)
                self._ready.update(dict.fromkeys(groups))
                await trio.sleep(RETRY_S)
                continue
            self.returned += len(groups)
            for group in groups:
                # asked for again meanwhile: the key may have come into being after this deletion
                if self._asked.get(group) == asked[group]:
                    self._asked.pop(group, None)
                    self.spent_s += trio.current_time() - self._since.pop(group, trio.current_time())
