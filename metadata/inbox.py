"""A mount's inbox of recall notices: what other mounts want back. One watch, whatever is held.

A notice is one key for all who want the thing, and goes with the last one's lease: only a watch sees every one. So
nothing may be held while the inbox can't be read, or others would wait for our lease to end.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from apollofs.metadata.errors import MetadataError
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import Session
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end

log = logging.getLogger(__name__)
REWATCH_S = 0.2


class Listener(Protocol):
    """Who holds something that can be recalled. No awaits."""

    def recalled(self, wanted: tuple[int, ...], what: bytes) -> None:
        """Somebody wants what the notice says of what these numbers name: (group,) or (ino, kind of lock)."""

    def deaf(self) -> None:
        """Recalls don't reach us any more: let go of everything."""


class Inbox:
    """See the module. `hearing`: recalls reach us."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._listeners: list[Listener] = []
        self.hearing = False

    def add(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def serve(self, session: Session) -> None:
        """Hear notices to `session` until cancelled. Runs beside the session's keepalive."""
        while True:
            try:
                await self._hear(session)
            except MetadataError as exc:
                log.info("the inbox of recalls can't be read: %s", exc)
                self.hearing = False
                for listener in self._listeners:
                    listener.deaf()
            await trio.sleep(REWATCH_S)

    async def _hear(self, session: Session) -> None:
        inbox = self._keys.inbox(session.number)
        found = await self._store.range(Range(inbox, prefix_end(inbox)))
        for kv in found.kvs:
            self._tell(kv)
        async with self._store.watch(inbox, prefix_end(inbox), start_revision=found.revision + 1) as batches:
            self.hearing = True
            async for batch in batches:
                for event in batch.events:
                    if not event.deleted:
                        self._tell(event.kv)

    def _tell(self, notice: KeyValue) -> None:
        wanted = self._keys.parse_numbers(notice.key)[1:]
        for listener in self._listeners:
            listener.recalled(wanted, notice.value)
