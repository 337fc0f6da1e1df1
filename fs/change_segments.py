"""Segments of the change log in the sites' blob stores, beside the bodies: `changes/<last revision>-<who>`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from apollofs.blobstore import BlobStoreError, BlockStore, NoSuchBlob
from apollofs.blobstore.listing import closing
from apollofs.fs.blobs import OpenStore
from apollofs.fs.user_error import UserError
from apollofs.metadata.changes.archive_index import SegmentEntry
from apollofs.metadata.changes.archiver import SEGMENT_PREFIX
from apollofs.metadata.changes.port import SegmentStore
from apollofs.metadata.errors import ArchiveUnavailable


class BlobSegments(SegmentStore):
    """Made by `open_segments`. Stores are opened at their first use."""

    def __init__(self, open_store: OpenStore, site: int) -> None:
        self._open_store = open_store
        self._site = site
        self._stores: dict[int, BlockStore] = {}
        self._opening = trio.Lock()

    @property
    def site(self) -> int:
        return self._site

    async def get(self, entry: SegmentEntry) -> bytes | None:
        with _translated(entry.name):
            try:
                store = await self._store(entry.site)
                return bytes(await store.read_block(entry.name, entry.size_bytes))
            except NoSuchBlob:
                return None

    async def put(self, name: str, data: bytes) -> None:
        with _translated(name):
            await (await self._store(self._site)).put(name, data)

    async def delete(self, entry: SegmentEntry) -> None:
        with _translated(entry.name):
            await (await self._store(entry.site)).delete(entry.name)

    async def names(self) -> list[str]:
        with _translated("the list of segments"):
            store = await self._store(self._site)
            async with closing(store.list(SEGMENT_PREFIX)) as found:
                return [entry.name async for entry in found]

    async def discard(self, name: str) -> None:
        with _translated(name):
            await (await self._store(self._site)).delete(name)

    async def aclose(self) -> None:
        """Close what was opened."""
        stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            await store.aclose()

    async def _store(self, site: int) -> BlockStore:
        async with self._opening:
            if site not in self._stores:
                self._stores[site] = await self._open_store(site)
            return self._stores[site]


@asynccontextmanager
async def open_segments(open_store: OpenStore, site: int) -> AsyncIterator[BlobSegments]:
    """Segments of which new ones go to the store of `site`; stores are closed at the end."""
    segments = BlobSegments(open_store, site)
    try:
        yield segments
    finally:
        with trio.CancelScope(shield=True):
            await segments.aclose()


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (BlobStoreError, UserError) as exc:
        raise ArchiveUnavailable(f"the archive of the change log: {what}: {exc}") from exc
