"""The change log of a volume from outside any mount: the volume's stores opened, and all given back at the end.

async with connected_store(access) as store, open_changes(store, volume, BlobStoreOptions()) as changes:
    async with aclosing(records(changes, await changes.beginning(), follow=True)) as found:
        async for record in found:
            ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.change_segments import BlobSegments, open_segments
from apollofs.fs.site_stores import SiteStores, UnmountedVolume
from apollofs.fs.user_error import UserError
from apollofs.metadata.changes.archiver import ArchiveOptions, Archiver
from apollofs.metadata.changes.log import ChangeLog, Selects
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.format import list_sites, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Store


@asynccontextmanager
async def open_changes(store: Store, volume: str, stores: BlobStoreOptions) -> AsyncIterator[ChangeLog]:
    """A volume's change log, live and archived. Raises NotFormatted."""
    async with _segments(store, volume, stores, "") as segments:
        yield ChangeLog(store, Keys(volume), segments)


@asynccontextmanager
async def open_archiver(
    store: Store, volume: str, stores: BlobStoreOptions, site: str, options: ArchiveOptions
) -> AsyncIterator[Archiver]:
    """An archiver that stores at a site (""; the first one). Raises NotFormatted, UserError for an unknown site."""
    async with _segments(store, volume, stores, site) as segments:
        yield Archiver(store, Keys(volume), segments, options)


async def records(
    changes: ChangeLog, start: Position, *, follow: bool = False, selects: Selects | None = None
) -> AsyncGenerator[ChangeRecord, None]:
    """Record by record what `ChangeLog.read` gives in batches. A generator: close it."""
    async with aclosing(changes.read(start, follow=follow, selects=selects)) as batches:
        async for batch in batches:
            for record in batch.records:
                yield record


@asynccontextmanager
async def _segments(store: Store, volume: str, stores: BlobStoreOptions, site: str) -> AsyncIterator[BlobSegments]:
    superblock = await read_superblock(store, volume)
    sites = await list_sites(store, volume)
    chosen = next((each for each in sites if each.name == site or not site), None)
    if chosen is None:
        raise UserError(f"volume {volume!r} has no site {site!r}: see `apollofs site list`")
    opened = SiteStores(UnmountedVolume(store, superblock), stores)
    async with open_segments(opened.open, chosen.id) as segments:
        yield segments
