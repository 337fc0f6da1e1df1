"""Giving delegations back: first what was answered ahead of the store is committed and the caches above drop what they
have of a group, then its keys are deleted. Sharing what was held exclusively: only the first of these."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
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

    async def drop_all(self, kept: Collection[int]) -> None:
        """As `drop`, of all groups but these."""

    def hurry(self, group: int) -> None:
        """An operation that has locked this directory above waits for others: `drop` must not wait for its lock."""

    def calm(self, group: int) -> None:
        """No operation does any more: from now on `drop` waits again."""

    def discard(self, group: int) -> None:
        """The directory is gone, or `holds` has said no: forget what was there."""


class NoCacheAbove:
    """Nothing is cached above."""

    def holds(self, group: int) -> bool:
        return False

    async def drop(self, group: int) -> None:
        pass

    async def drop_all(self, kept: Collection[int]) -> None:
        pass

    def hurry(self, group: int) -> None:
        pass

    def calm(self, group: int) -> None:
        pass

    def discard(self, group: int) -> None:
        pass


class Backlog(Protocol):
    """What has been answered of a group and is not in the store yet; `ahead.Ahead`."""

    def is_clear(self, group: int) -> bool:
        """Whether there is nothing."""

    async def clear_of(self, group: int) -> None:
        """Wait until there is nothing, or the session is gone."""


class Returns:
    """The groups that one mount is giving back. `group in returns` until the deletion of its key is through."""

    def __init__(self, keys: Keys, backlog: Backlog) -> None:
        self._keys = keys
        self._backlog = backlog
        self.above: CacheAbove = NoCacheAbove()
        self._asked: dict[int, int] = {}
        """With a number that tells whether it was asked for again."""
        self._since: dict[int, float] = {}
        self._count = 0
        self._dropping: set[int] = set()
        self._ready: dict[int, None] = {}
        self._shares: dict[int, int] = {}
        """As `_asked`, of groups that are only to be shared."""
        self._shared: dict[int, None] = {}
        self._wakeup = trio.Event()
        self._gone = trio.lowlevel.ParkingLot()
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
        self._shares.clear()
        self._shared.clear()
        self._gone.unpark_all()

    async def through(self, group: int) -> None:
        """Wait until a group is neither being given back nor shared, or the session is gone. No checkpoint if so."""
        while group in self._asked or group in self._shares:
            await self._gone.park()

    def share(self, group: int) -> None:
        """Let others read a group that is no longer held exclusively, whether or not the key that says so is there."""
        self._count += 1
        self._shares[group] = self._count
        self._begin_share(group)

    def is_sharing(self, group: int) -> bool:
        """Whether the key that says that a group is exclusive is about to be deleted."""
        return group in self._shares

    def _begin_share(self, group: int) -> None:
        if self._backlog.is_clear(group):
            self._shared[group] = None
            self._wakeup.set()
        elif self._nursery is not None:
            self._nursery.start_soon(self._share, group)

    async def _share(self, group: int) -> None:
        await self._backlog.clear_of(group)
        self._shared[group] = None
        self._wakeup.set()

    async def serve(self, session: Session) -> None:
        """Do what was asked for, until cancelled or the session ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for group in list(self._asked):
                    self._begin(group)
                for group in list(self._shares):
                    self._begin_share(group)
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
        if not self.above.holds(group) and self._backlog.is_clear(group):
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
                await self._backlog.clear_of(group)
                break
            except Exception:
                log.exception("a delegation can't be given back yet")
                await trio.sleep(RETRY_S)
        self._dropping.discard(group)
        self._ready[group] = None
        self._wakeup.set()

    async def _delete_ready(self, session: Session) -> None:
        """Delete the keys of what the cache above has dropped, and of what is shared, several in one transaction."""
        while self._ready or self._shared:
            groups = list(self._ready)[:GROUPS_IN_TRANSACTION]
            shared = list(self._shared)[: GROUPS_IN_TRANSACTION - len(groups)]
            asked = {group: self._asked.get(group) for group in groups}
            shares = {group: self._shares.get(group) for group in (*groups, *shared)}
            for group in groups:
                del self._ready[group]
            for group in shared:
                del self._shared[group]
            deletes: list[Op] = [Delete(self._keys.delegation(group, session.number)) for group in groups]
            for group in dict.fromkeys((*groups, *shared)):
                deletes.append(Delete(self._keys.exclusive(group, session.number)))
                deletes.append(Delete(self._keys.recall(session.number, group)))
            try:
                await session.commit((), deletes, NOTED, time_ns=time.time_ns())
            except SessionLost:
                return
            except MetadataError as exc:
                log.info("delegations not given back yet: %s", exc)
                self._ready.update(dict.fromkeys(groups))
                self._shared.update(dict.fromkeys(shared))
                await trio.sleep(RETRY_S)
                continue
            self.returned += len(groups)
            for group, number in shares.items():
                if self._shares.get(group) == number:
                    self._shares.pop(group, None)
            for group in groups:
                # asked for again meanwhile: the key may have come into being after this deletion
                if self._asked.get(group) == asked[group]:
                    self._asked.pop(group, None)
                    self.spent_s += trio.current_time() - self._since.pop(group, trio.current_time())
            self._gone.unpark_all()
