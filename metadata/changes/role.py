"""A role: what only one process does at a time. Who holds its key, put under a lease, has it.

Rules
1. Every transaction of a role compares that its key is the one that was put here: once the lease has ended, and
   somebody else may have the role, it changes nothing.
2. A transaction whose outcome isn't known is sent again. It is such that a second application would change nothing, or
   compares what the first has changed; then what it wrote tells that it was applied.
3. Who wants the role waits, by watch, until the key is gone.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import (
    Compacted,
    DeadlineExceeded,
    LeaseNotFound,
    OutcomeUnknown,
    RoleLost,
    RoleTaken,
    StoreError,
    StoreUnavailable,
)
from apollofs.metadata.session import BACKOFF_FIRST_S, CLOCK_RATE_MARGIN, boot_time, retry
from apollofs.metadata.store import NOW, Compare, Op, Put, Range, Relation, Store, Target

log = logging.getLogger(__name__)
COMMIT_S = 30.0
CLOSE_S = 5.0


class Role:
    """Made by `held_role`."""

    def __init__(self, store: Store, key: bytes, what: str, ttl_s: int) -> None:
        self._store = store
        self._key = key
        self._what = what
        self._ttl_s = ttl_s
        self.lease_id = 0
        """Unique in the store: names what is made in this role."""
        self._created = 0
        self.is_lost = False

    @property
    def token(self) -> str:
        """The lease, for the names of what is made in this role: nobody else makes these."""
        return f"{self.lease_id & (1 << 64) - 1:016x}"

    async def commit(
        self, compares: Sequence[Compare], writes: Sequence[Op], written: tuple[bytes, bytes] | None = None
    ) -> int:
        """Apply `writes` if the role is still held and `compares` hold; the revision. They must hold but for this very
        transaction having been applied before, which (key, value) `written` tells, then.

        Raises RoleLost (nothing was changed), DeadlineExceeded, StoreError.
        """
        compares = (self.fence(), *compares)
        orelse = (Range(self._key), Range(written[0])) if written else (Range(self._key),)
        deadline = trio.current_time() + COMMIT_S
        while True:
            try:
                result = await self._store.txn(compares, writes, orelse)
                break
            except (OutcomeUnknown, StoreUnavailable) as exc:
                if trio.current_time() > deadline:
                    raise DeadlineExceeded(f"metadata store: {exc}") from exc
            await trio.sleep(BACKOFF_FIRST_S * (0.5 + random.random()))
        if result.succeeded:
            return result.revision
        holder, *found = result.ranges
        if holder is not None and holder.kvs and holder.kvs[0].create_revision == self._created and found:
            kvs = found[0].kvs if found[0] is not None else ()
            if written is not None and kvs and kvs[0].value == written[1]:
                return kvs[0].mod_revision
        self.is_lost = True
        raise RoleLost(f"somebody else {self._what} by now")

    def fence(self) -> Compare:
        """Holds as long as the role is held."""
        return Compare(self._key, Target.CREATE, Relation.EQUAL, self._created)

    # -- life --------------------------------------------------------------------------------------------------------

    async def acquire(self, *, wait: bool) -> None:
        """Raises RoleTaken if somebody else has it and `wait` is not set; RoleLost if the lease has ended meanwhile, as
        of a host that was frozen."""
        who = f"process {os.getpid()} on {socket.gethostname()}"
        free = Compare(self._key, Target.VERSION, Relation.EQUAL, 0)
        put = Put(self._key, codec.encode_fields([who]), self.lease_id)
        while True:
            try:
                result = await retry(lambda: self._store.txn((free,), (put,), (Range(self._key),)), COMMIT_S)
            except LeaseNotFound:
                raise RoleLost(f"the lease of who {self._what}, or waits to, has ended") from None
            if result.succeeded:
                self._created = result.revision
                return
            found = result.ranges[0]
            assert found is not None
            holder = found.kvs[0]
            if holder.lease == self.lease_id:
                self._created = holder.create_revision  # an earlier copy of this transaction, whose reply was lost
                return
            if not wait:
                raise RoleTaken(f"{codec.decode_fields(holder.value)[0]} {self._what} already")
            await self._gone()

    async def _gone(self) -> None:
        """Wait until nobody has it, or it is worth another look."""
        with suppress(Compacted):
            await self._watch_gone()

    async def _watch_gone(self) -> None:
        async with self._store.watch(self._key, start_revision=NOW) as batches:
            await anext(batches)
            if not (await retry(lambda: self._store.range(Range(self._key)), COMMIT_S)).kvs:
                return
            async for batch in batches:
                if any(event.deleted for event in batch.events):
                    return

    async def keep_alive(self, scope: trio.CancelScope) -> None:
        """Renew the lease; when it is known to have ended, or may have, cancel `scope`."""
        valid_until = boot_time() + self._ttl_s * CLOCK_RATE_MARGIN
        while boot_time() < valid_until:
            await trio.sleep(self._ttl_s / 4)
            sent = boot_time()
            with suppress(StoreError), trio.move_on_after(self._ttl_s / 4):
                if not await self._store.lease_keepalive(self.lease_id):
                    break
                valid_until = sent + self._ttl_s * CLOCK_RATE_MARGIN
        self.is_lost = True
        scope.cancel()

    async def release(self) -> None:
        """Let the next one have it at once. Best effort, bounded."""
        with trio.move_on_after(CLOSE_S, shield=True), suppress(StoreError):
            await self._store.lease_revoke(self.lease_id)


@asynccontextmanager
async def held_role(store: Store, key: bytes, what: str, ttl_s: int, *, wait: bool) -> AsyncIterator[Role]:
    """Have the role in the block. `what` is what its holder does, for messages: "archives the change log".

    The block is cancelled when the role is lost, and RoleLost raised in its place. Raises RoleTaken unless `wait`.
    """
    role = Role(store, key, what, ttl_s)
    role.lease_id = (await retry(lambda: store.lease_grant(ttl_s), COMMIT_S)).id
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(role.keep_alive, nursery.cancel_scope)
            await role.acquire(wait=wait)
            yield role
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # there is one task beside the block, and it raises nothing: what is in the group is the block's own
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.__cause__
        raise
    finally:
        await role.release()
    if role.is_lost:
        raise RoleLost(f"the lease of who {what} has ended")


async def holder_of(store: Store, key: bytes) -> str:
    """Who has a role, in words; "" if nobody. Raises DeadlineExceeded, StoreError."""
    found = await retry(lambda: store.range(Range(key)), COMMIT_S)
    return str(codec.decode_fields(found.kvs[0].value)[0]) if found.kvs else ""
