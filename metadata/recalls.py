"""Asking other mounts to give back their delegations on what an operation changes, and waiting until they have."""

from __future__ import annotations

import time
from collections.abc import Sequence

import trio

from apollofs.metadata.errors import Compacted, DeadlineExceeded
from apollofs.metadata.groups import Claim
from apollofs.metadata.keys import Keys
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import NOW, Delete, Op, Put, Range, RangeResult, Store, prefix_end

NOTICES_IN_TRANSACTION = 100


class Recalls:
    """The writer's side of a recall; the holder's is in `delegations.py`."""

    def __init__(self, store: Store, keys: Keys, wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self._wait_s = wait_s
        self.sent = 0
        self.waited_s = 0.0
        """How long operations waited for others to give back, altogether."""

    def others(self, session: Session, found: Sequence[RangeResult]) -> list[tuple[int, int]]:
        """(group, session) of each holder that `found` names, but for this session."""
        numbers = [self._keys.parse_numbers(kv.key) for answer in found for kv in answer.kvs]
        return [(group, holder) for group, holder in numbers if holder != session.number]

    async def recall(self, session: Session, found: Sequence[RangeResult], claim: Claim) -> None:
        """Ask every other holder of the groups in `found` to give back, and wait.

        The operation's transaction, or whoever gives it up, deletes `claim.waits`. Raises DeadlineExceeded,
        SessionLost, StoreError.
        """
        began = trio.current_time()
        wanted = dict.fromkeys(group for group, _ in self.others(session, found))
        holders = await self._claim(session, wanted, claim)
        notices: list[Op] = [Put(self._keys.recall(holder, group), b"", session.lease_id) for group, holder in holders]
        for at in range(0, len(notices), NOTICES_IN_TRANSACTION):
            part = notices[at : at + NOTICES_IN_TRANSACTION]
            await session.commit((), part, NOTED, time_ns=time.time_ns())
        self.sent += len(holders)
        with trio.move_on_after(self._wait_s) as waiting:
            for group in wanted:
                await self._wait_for(group, session.number)
        self.waited_s += trio.current_time() - began
        if waiting.cancelled_caught:
            raise DeadlineExceeded("another mount has not given its delegation back (the operation was not applied)")

    async def _claim(self, session: Session, wanted: dict[int, None], claim: Claim) -> list[tuple[int, int]]:
        """Say in the store that we wait for `wanted`. Nobody takes them any more then: who holds them now are all."""
        waits = [self._keys.writer(group, session.number, claim.ticket) for group in wanted]
        claim.waits.update((key, Delete(key)) for key in waits)
        puts: list[Op] = [Put(key, b"", session.lease_id) for key in waits]
        prefixes = [self._keys.delegations_on(group) for group in wanted]
        asked = [Range(prefix, prefix_end(prefix), keys_only=True) for prefix in prefixes]
        outcome = await session.commit((), [*puts, *asked], NOTED, time_ns=time.time_ns())
        if outcome.ranges is not None:
            answers = outcome.ranges[len(puts) :]
        else:
            answers = (await retry(lambda: self._store.txn((), asked), self._wait_s)).ranges
        return self.others(session, [answer for answer in answers if answer is not None])

    async def _wait_for(self, group: int, mine: int) -> None:
        prefix = self._keys.delegations_on(group)
        while True:
            try:
                async with self._store.watch(prefix, prefix_end(prefix), start_revision=NOW) as batches:
                    await anext(batches)
                    while not await self._is_free(prefix, mine):
                        await anext(batches)
                    return
            except Compacted:
                continue

    async def _is_free(self, prefix: bytes, mine: int) -> bool:
        asked = Range(prefix, prefix_end(prefix), keys_only=True)
        found = await retry(lambda: self._store.range(asked), self._wait_s)
        return all(self._keys.parse_numbers(kv.key)[1] == mine for kv in found.kvs)
