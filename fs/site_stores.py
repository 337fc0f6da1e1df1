"""The blob stores of one volume: each site's location, and below it a part that no other volume uses.

Blob numbers are unique in a volume only, so two volumes that were given the same bucket and prefix must not meet: the
objects of a volume lie below `volume-<uuid>` there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import trio

from apollofs.blobstore import (
    BlobMetrics,
    BlobStoreOptions,
    BlockStore,
    LocalLocation,
    Location,
    location_from_dict,
    open_blob_store,
    prepare_blob_store,
)
from apollofs.fs.user_error import UserError
from apollofs.metadata.format import list_sites
from apollofs.metadata.records import SiteRecord, Superblock
from apollofs.metadata.store import Store

DELETES_AT_ONCE = 16
VOLUME_PART = "volume-"


def location_of(site: SiteRecord, volume_uuid: str) -> Location:
    """Where the bodies of one volume are at a site. Raises BadBlobURL for a damaged record."""
    location = location_from_dict(dict(site.store))
    part = VOLUME_PART + volume_uuid
    if isinstance(location, LocalLocation):
        return replace(location, directory=os.path.join(location.directory, part))
    return replace(location, prefix=f"{location.prefix}/{part}" if location.prefix else part)


class HasSites(Protocol):
    """A volume, as far as its stores are concerned: `metadata.volume.Volume`, or `UnmountedVolume`."""

    superblock: Superblock

    async def sites(self) -> tuple[SiteRecord, ...]: ...


class UnmountedVolume(HasSites):
    """A volume for commands that work on its bodies without mounting it."""

    def __init__(self, store: Store, superblock: Superblock) -> None:
        self._store = store
        self.superblock = superblock

    async def sites(self) -> tuple[SiteRecord, ...]:
        return tuple(await list_sites(self._store, self.superblock.name))


class SiteStores:
    """Opens stores by the site's number, for `blobs.BlobSource`; counts what all of them do."""

    def __init__(self, volume: HasSites, options: BlobStoreOptions) -> None:
        self._volume = volume
        self._options = options
        self.metrics: dict[int, BlobMetrics] = {}

    async def open(self, site_id: int) -> BlockStore:
        """The store of a site. Raises UserError where the volume has no such site, BlobStoreError."""
        for site in await self._volume.sites():
            if site.id == site_id:
                return await self.open_site(site)
        raise UserError(f"the volume has no site {site_id} any more")

    async def open_site(self, site: SiteRecord) -> BlockStore:
        """Raises BlobStoreError: with one line for a person if the store can't be used."""
        location = location_of(site, self._volume.superblock.uuid)
        if isinstance(location, LocalLocation):
            # only the volume's own part is made: a base that is missing may be a disk that is not mounted
            base = location_from_dict(dict(site.store))
            await prepare_blob_store(base, self._options, create=False)
            await prepare_blob_store(location, self._options, create=True)
        metrics = self.metrics.setdefault(site.id, BlobMetrics())
        return await open_blob_store(location, self._options, metrics)

    async def check_site(self, site: SiteRecord) -> None:
        """See that the store of the mount's own site can be used. Raises BlobStoreError with one line."""
        await prepare_blob_store(location_from_dict(dict(site.store)), self._options, create=False)

    def statistics(self) -> Mapping[str, int]:
        """Counters for `status`, over all sites."""
        found = [metrics.snapshot() for metrics in self.metrics.values()]
        return {
            "read_bytes": sum(one.bytes_read for one in found),
            "written_bytes": sum(one.bytes_written for one in found),
            "calls": sum(sum(one.calls.values()) for one in found),
            "retries": sum(sum(one.retries.values()) for one in found),
            "in_flight": sum(one.in_flight for one in found),
        }


async def remove_objects(location: Location, options: BlobStoreOptions) -> int:
    """Delete every object at a volume's location (`location_of`), and the directory there; how many objects. Raises
    BlobStoreError. Begun again, it goes on."""
    if isinstance(location, LocalLocation) and not await trio.Path(location.directory).is_dir():
        return 0
    store = await open_blob_store(location, options)
    removed = 0
    try:
        async with trio.open_nursery() as nursery:
            names_in, names_out = trio.open_memory_channel[str](DELETES_AT_ONCE)
            for _ in range(DELETES_AT_ONCE):
                nursery.start_soon(_delete_each, store, names_out)
            async with names_in:
                async for blob in store.list():
                    await names_in.send(blob.name)
                    removed += 1
    finally:
        await store.aclose()
    if isinstance(location, LocalLocation):
        # what is left are directories, and what writers that died had not finished
        assert os.path.basename(location.directory).startswith(VOLUME_PART)
        await trio.to_thread.run_sync(partial(shutil.rmtree, location.directory, ignore_errors=True))
    return removed


async def _delete_each(store: BlockStore, names: trio.MemoryReceiveChannel[str]) -> None:
    async for name in names:
        await store.delete(name)
