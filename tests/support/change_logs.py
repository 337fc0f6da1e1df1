"""The change log in tests: read as a whole, archived into memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import trio

from apollofs.blobstore import BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.blobstore.verify import VerifyingStore
from apollofs.fs.change_segments import BlobSegments
from apollofs.metadata.changes.archiver import ArchiveOptions, Archiver, ArchiveReport
from apollofs.metadata.changes.log import ChangeLog, Selects
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.format import pages
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.store import Store
from tests.support.volumes import VOLUME, assert_sound, make_volume

KEYS = Keys(VOLUME)


class World:
    """A volume on a store, and where its segments are kept."""

    def __init__(self, store: MemoryStore, blobs: BlockStore) -> None:
        self.store = store
        self.blobs = blobs

    def segments(self) -> BlobSegments:
        async def open_store(site: int) -> BlockStore:
            await trio.lowlevel.checkpoint()
            return self.blobs

        return BlobSegments(open_store, 1)

    def log(self, store: Store | None = None) -> ChangeLog:
        return ChangeLog(store or self.store, KEYS, self.segments())

    async def read(
        self, start: Position | None = None, *, selects: Selects | None = None, store: Store | None = None
    ) -> list[ChangeRecord]:
        """Everything from a position (None: the beginning) up to now."""
        log = self.log(store)
        found: list[ChangeRecord] = []
        start = start or await log.beginning()
        async with aclosing(log.read(start, selects=selects)) as batches:
            async for batch in batches:
                found += batch.records
                assert not found or found[-1].position < batch.after
        return found

    async def archive(
        self, options: ArchiveOptions | None = None, *, store: Store | None = None, wait: bool = True
    ) -> ArchiveReport:
        """Archive everything up to now."""
        archiver = Archiver(store or self.store, KEYS, self.segments(), options or ArchiveOptions())
        await archiver.run(once=True, wait=wait)
        return archiver.report

    async def objects(self) -> list[str]:
        return [entry.name async for entry in self.blobs.list()]

    async def keys_in(self, letter: str) -> list[bytes]:
        return [kv.key async for kv in pages(self.store, KEYS.table(letter.encode()))]


@asynccontextmanager
async def made_world() -> AsyncIterator[World]:
    store = MemoryStore()
    await make_volume(store)
    yield World(store, VerifyingStore(MemoryBlobs()))
    await assert_sound(store)
