"""How much the volume holds: each session counts its own changes in `u/<session>`, and readers add them up.

A session writes its sum every few seconds and when it ends, fenced like everything else. What a crashed mount had not
yet written stays missing, so the numbers serve statfs and nothing else. The sums of ended sessions are folded into
`u/0`, so that the keys do not grow with the number of mounts there ever were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import MetadataError, SessionLost
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Usage
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import Compare, Delete, KeyValue, Put, Range, Relation, Target, prefix_end
from apollofs.metadata.transact import Transactor

log = logging.getLogger(__name__)
FLUSH_EVERY_S = 5.0
FOLD_OVER = 16
"""Sums of ended sessions that may stand before they are folded."""
FOLD_MAX = 100
"""How many are folded in one transaction."""


class UsageKeeper:
    """Writes this mount's sum."""

    def __init__(self, transactor: Transactor, keys: Keys) -> None:
        self._transactor = transactor
        self._keys = keys
        self._written = Usage(0, 0)

    async def keep(self, session: Session) -> None:
        """Fold what earlier sessions left, then flush now and then, until cancelled."""
        self._transactor.usage_bytes = self._transactor.usage_inodes = 0
        self._written = Usage(0, 0)
        await self._guarded(fold(self._transactor, self._keys, session))
        while True:
            await trio.sleep(FLUSH_EVERY_S)
            await self._guarded(self.flush(session))

    async def flush(self, session: Session) -> None:
        """One transaction, none if nothing has changed. Raises what `Session.commit` raises."""
        usage = Usage(self._transactor.usage_bytes, self._transactor.usage_inodes)
        if usage == self._written:
            return
        put = Put(self._keys.usage(session.number), codec.encode_usage(usage))
        await session.commit((), (put,), (Change(Kind.USAGE),), time_ns=time.time_ns())
        self._written = usage

    @staticmethod
    async def _guarded(work: Awaitable[None]) -> None:
        try:
            await work
        except SessionLost as exc:
            log.debug("usage not written: %s", exc)  # the session's own task reports the loss
        except MetadataError as exc:
            log.info("usage not written, it will be tried again: %s", exc)


async def read_usage(transactor: Transactor, keys: Keys, session: Session | None) -> Usage:
    """The sum over all sessions; this mount's own is taken from memory."""
    _, (found,) = await transactor.read([Range(keys.usages, prefix_end(keys.usages))])
    own = keys.usage(session.number) if session is not None else b""
    sums = [codec.decode_usage(kv.value) for kv in found.kvs if kv.key != own]
    sums.append(Usage(transactor.usage_bytes, transactor.usage_inodes))
    return Usage(max(sum(u.bytes for u in sums), 0), max(sum(u.inodes for u in sums), 0))


async def fold(transactor: Transactor, keys: Keys, session: Session) -> None:
    """Add the sums of ended sessions to `u/0` and remove them. One transaction, or none."""
    asked = [
        Range(keys.usages, prefix_end(keys.usages), limit=4096),
        Range(keys.mounts, prefix_end(keys.mounts), keys_only=True),
    ]
    _, (sums, mounts) = await transactor.read(asked)
    alive = {keys.parse_session(kv.key) for kv in mounts.kvs}
    dead = [kv for kv in sums.kvs if keys.parse_numbers(kv.key)[0] not in alive | {0}][:FOLD_MAX]
    if len(dead) <= FOLD_OVER:
        return
    total: KeyValue | None = next((kv for kv in sums.kvs if kv.key == keys.usage(0)), None)
    values = [codec.decode_usage(kv.value) for kv in [*dead, *([total] if total else [])]]
    folded = Usage(sum(u.bytes for u in values), sum(u.inodes for u in values))
    compares = [Compare(kv.key, Target.MOD, Relation.EQUAL, kv.mod_revision) for kv in dead]
    compares.append(Compare(keys.usage(0), Target.MOD, Relation.EQUAL, total.mod_revision if total else 0))
    writes: list[Put | Delete] = [Put(keys.usage(0), codec.encode_usage(folded)), *(Delete(kv.key) for kv in dead)]
    outcome = await session.commit(compares, writes, (Change(Kind.USAGE),), time_ns=time.time_ns())
    if isinstance(outcome, Committed):
        log.info("usage of %d ended sessions folded", len(dead))
