"""A run of the collector from outside any mount: the volume's stores opened, a session taken, everything given back."""

from __future__ import annotations

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.collection import CollectOptions, CollectReport
from apollofs.fs.collector import Collection
from apollofs.fs.command_volume import command_record
from apollofs.fs.site_stores import SiteStores, UnmountedVolume
from apollofs.fs.ungrouped import ungrouped
from apollofs.metadata.collector import open_collector
from apollofs.metadata.format import list_sites, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store


async def collect(
    store: Store, volume: str, options: CollectOptions, stores: BlobStoreOptions, version: str
) -> CollectReport:
    """Collect the garbage of a volume once, in all its sites. Raises what `Collection.run` does, CollectorBusy,
    NotFormatted. Cancelled, the next run goes on."""
    superblock = await read_superblock(store, volume)
    sites = await list_sites(store, volume)
    opened = SiteStores(UnmountedVolume(store, superblock), stores)
    record = command_record(version)
    with ungrouped():
        async with (
            open_blob_source(opened.open, superblock.block_bytes) as source,
            open_collector(store, volume, record, SessionOptions(), options.answer_wait_s) as collector,
        ):
            return await Collection(store, Keys(volume), collector, source, options).run(sites)
