"""Asking other mounts to give back their delegations, or to share what they hold exclusively, and waiting for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import trio

from apollofs.metadata.errors import Compacted, DeadlineExceeded, SessionLost
from apollofs.metadata.groups import Claim
from apollofs.metadata.keys import Keys
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import Delete, Op, Put, Range, RangeResult, Store, prefix_end

NOTICES_IN_TRANSACTION = 100
DROP = b""
SHARE = b"s"
"""What a notice asks for: give the group back, or let others read it."""
RETRY_S = 0.1


class Recalls:
    """The asking side of a recall; the holder's is in `delegations.py`."""

    def __init__(self, store: Store, keys: Keys, wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self._wait_s = wait_s
        self.session: Session | None = None
        """In which readers ask."""
        self.sent = 0
        self.waited_s = 0.0
        """How long operations waited for others to give back, altogether."""

    def others(self, session: Session, found: Sequence[RangeResult]) -> list[tuple[int, int]]:
        """(group, session) of each holder that `found` names, but for this session."""
        numbers = [self._keys.parse_numbers(kv.key) for answer in found for kv in answer.kvs]
        return [(group, holder) for group, holder in numbers if holder != session.number]

    async def recall(self, session: Session, found: Sequence[RangeResult], claim: Claim) -> None:
        """Ask every other holder of the groups in `found` to give back, and wait. One transaction, and one event of a
        watch for each group, unless there were more holders than `found` names.

        The operation's transaction, or whoever gives it up, deletes `claim.waits`. Raises DeadlineExceeded,
        SessionLost, StoreError.
        """
        began = trio.current_time()
        known = self.others(session, found)
        holders, revision = await self._claim(session, known, claim)
        unasked = sorted(set(holders) - set(known))
        await self._notify(session, unasked)
        self.sent += len(holders)
        await self._wait_for([self._keys.delegation(*holder) for holder in holders], revision)
        self.waited_s += trio.current_time() - began

    async def share(self, holders: Sequence[tuple[int, int]]) -> None:
        """Have those who hold groups exclusively, (group, session), commit what they have answered, and wait until
        they hold them as others may. Returns sooner where this mount has lost its session: ask again.

        Raises DeadlineExceeded, StoreError.
        """
        session = self.session
        if session is None:
            await trio.sleep(RETRY_S)
            return
        began = trio.current_time()
        puts = [Put(self._keys.recall(holder, group), SHARE, session.lease_id) for group, holder in holders]
        keys = [self._keys.exclusive(*holder) for holder in holders]
        asked = [Range(key, keys_only=True) for key in keys]
        try:
            outcome = await session.commit((), (*puts, *asked), NOTED, time_ns=time.time_ns())
        except SessionLost:
            return
        self.sent += len(holders)
        answers = outcome.ranges[len(puts) :] if outcome.ranges is not None else ()
        await self._wait_for([kv.key for found in answers if found is not None for kv in found.kvs], outcome.revision)
        self.waited_s += trio.current_time() - began

    async def _claim(
        self, session: Session, known: Sequence[tuple[int, int]], claim: Claim
    ) -> tuple[list[tuple[int, int]], int]:
        """Say in the store that we wait for groups, with notices to the holders that are known. Nobody takes them any
        more then: who holds them now, as of a revision, are all."""
        wanted = dict.fromkeys(group for group, _ in known)
        waits = [self._keys.writer(group, session.number, claim.ticket) for group in wanted]
        claim.waits.update((key, Delete(key)) for key in waits)
        first = known[: NOTICES_IN_TRANSACTION - 2 * len(waits)]
        puts: list[Op] = [Put(key, b"", session.lease_id) for key in waits]
        puts += [Put(self._keys.recall(holder, group), DROP, session.lease_id) for group, holder in first]
        prefixes = [self._keys.delegations_on(group) for group in wanted]
        asked = [Range(prefix, prefix_end(prefix), keys_only=True) for prefix in prefixes]
        outcome = await session.commit((), [*puts, *asked], NOTED, time_ns=time.time_ns())
        await self._notify(session, known[len(first) :])
        if outcome.ranges is not None:
            answers = outcome.ranges[len(puts) :]
        else:
            answers = (await retry(lambda: self._store.txn((), asked), self._wait_s)).ranges
        return self.others(session, [answer for answer in answers if answer is not None]), outcome.revision

    async def _notify(self, session: Session, holders: Sequence[tuple[int, int]]) -> None:
        for at in range(0, len(holders), NOTICES_IN_TRANSACTION):
            part = holders[at : at + NOTICES_IN_TRANSACTION]
            puts = [Put(self._keys.recall(holder, group), DROP, session.lease_id) for group, holder in part]
            await session.commit((), puts, NOTED, time_ns=time.time_ns())

    async def _wait_for(self, keys: Sequence[bytes], revision: int) -> None:
        """Wait until each of the keys, which were there at `revision`, has been deleted."""
        with trio.move_on_after(self._wait_s) as waiting:
            for key in keys:
                await self._wait_for_one(key, revision)
        if waiting.cancelled_caught:
            raise DeadlineExceeded("another mount has not given its delegation back (the operation was not applied)")

    async def _wait_for_one(self, key: bytes, revision: int) -> None:
        while True:
            try:
                async with self._store.watch(key, key + b"\0", start_revision=revision + 1) as batches:
                    async for batch in batches:
                        if any(event.deleted for event in batch.events):
                            return
            except Compacted:
                found = await retry(lambda: self._store.range(Range(key, keys_only=True)), self._wait_s)
                if not found.kvs:
                    return
                revision = found.revision
