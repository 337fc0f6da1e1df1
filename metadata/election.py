"""Being the only one of a kind: who holds a key under the lease of its session is it, for as long as the lease lives.

The key alone excludes nobody who was frozen and wakes up: what the winner does it commits in the same session, whose
journal slots end with the same lease.
"""

from __future__ import annotations

import time

from apollofs.metadata import codec
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import MountRecord
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import NOW, Compare, Put, Range, Relation, Store, Target


class Election:
    """A candidate's session and the key that all of them want. Methods raise SessionLost, DeadlineExceeded,
    StoreError."""

    def __init__(self, store: Store, keys: Keys, session: Session, key: bytes) -> None:
        self._store = store
        self._keys = keys
        self._session = session
        self._key = key

    async def stand(self) -> MountRecord | None:
        """Take the key if nobody has it: None. Otherwise who has it. One transaction."""
        put = Put(self._key, codec.encode_mount(self._session.record), self._session.lease_id)
        free = Compare(self._key, Target.VERSION, Relation.EQUAL, 0)
        outcome = await self._session.commit((free,), (put,), NOTED, time_ns=time.time_ns(), orelse=(Range(self._key),))
        if isinstance(outcome, Committed):
            return None
        found = outcome.ranges[0]
        assert found is not None
        return codec.decode_mount(found.kvs[0].value)

    async def win(self) -> None:
        """Wait until nobody else has the key, and take it."""
        while await self.stand() is not None:
            async with self._store.watch(self._key, start_revision=NOW) as changes:
                await anext(changes)
                if await self.stand() is None:
                    return
                async for batch in changes:
                    if any(event.deleted for event in batch.events):
                        break


async def read_winner(store: Store, key: bytes) -> MountRecord | None:
    """Who has the key now."""
    found = await store.range(Range(key))
    return codec.decode_mount(found.kvs[0].value) if found.kvs else None
