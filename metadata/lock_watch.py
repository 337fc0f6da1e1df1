"""The watch that keeps the picture of one inode's locks up to date while requests wait, or have waited just before."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import trio

from apollofs.metadata.errors import Compacted, OutcomeUnknown, StoreUnavailable
from apollofs.metadata.lock_ledger import Ledger
from apollofs.metadata.store import NOW, WatchBatch

log = logging.getLogger(__name__)
REWATCH_S = 0.5


class LockWatch:
    """Opened by who first waits, and left open for the next: in a lock that goes from hand to hand somebody waits
    again soon, and a watch that is there already is told at once. Read by one at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._opened: AbstractAsyncContextManager[AsyncIterator[WatchBatch]] | None = None
        self._batches: AsyncIterator[WatchBatch] | None = None
        self._begins = 0
        """The revision from which on it tells all."""
        self._joined = False
        """Whether the picture is as of then or later."""

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    async def changed(self) -> None:
        """Wait until the picture has changed, or may have. A watch that breaks is opened again. Raises SessionLost,
        DeadlineExceeded, CorruptRecord. Cancelled, it stays open and nothing is lost."""
        try:
            await self._next()
        except Compacted:
            await self.close()
        except (StoreUnavailable, OutcomeUnknown) as exc:
            log.info("the watch on the locks of inode %d broke: %s", self._ledger.ino, exc)
            await self.close()
            await trio.sleep(REWATCH_S)
        except Exception:
            await self.close()
            raise

    async def _next(self) -> None:
        places, picture = self._ledger.places, self._ledger.picture
        if self._batches is None:
            opening = self._ledger.store.watch(places.all, places.end, start_revision=NOW)
            self._batches = await opening.__aenter__()
            self._opened = opening
        if self._joined:
            batch = await anext(self._batches)
            picture.apply(batch.revision, batch.events)
            return
        if not self._begins:
            self._begins = (await anext(self._batches)).revision
        if picture.revision < self._begins:
            await self._ledger.read()
        self._joined = True

    async def close(self) -> None:
        """What comes next begins anew."""
        opened, self._opened, self._batches = self._opened, None, None
        self._begins, self._joined = 0, False
        if opened is not None:
            await opened.__aexit__(None, None, None)
