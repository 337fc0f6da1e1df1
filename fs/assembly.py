"""Putting a mount's parts together: store, volume, blob stores, filesystem, FUSE shell; and taking them apart."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from apollofs.blobstore import BlobStoreError, BlobStoreOptions, Limits, Location, RetryPolicy
from apollofs.fs.config import BodyConfig
from apollofs.fs.connect import connected_store
from apollofs.fs.errno_map import errno_of
from apollofs.fs.filesystem import Filesystem, open_filesystem
from apollofs.fs.mount_config import MountConfig
from apollofs.fs.mountinfo import mount_of
from apollofs.fs.operations import Operations
from apollofs.fs.packing import IN_FLIGHT_MAX
from apollofs.fs.site_stores import SiteStores, location_of
from apollofs.fs.user_error import UserError
from apollofs.fs.wire import Wire, WireConfig
from apollofs.fs.wire_constants import InitFlag
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.errors import SessionLost
from apollofs.metadata.records import MountRecord
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.volume import Volume, open_volume


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts of a mount that is about to serve."""

    store: CountingStore
    volume: Volume
    stores: SiteStores
    filesystem: Filesystem
    operations: Operations
    wire: Wire

    @property
    def location(self) -> Location:
        """Where this mount's site keeps the volume's bodies."""
        return location_of(self.volume.site, self.volume.superblock.uuid)

    def statistics(self) -> dict[str, Mapping[str, float]]:
        """Counters, by what they are of."""
        return {
            "etcd": self.store.statistics(),
            **self.volume.statistics(),
            **self.filesystem.statistics(),
            "blob_store": self.stores.statistics(),
        }

    def session_facts(self) -> Mapping[str, Any]:
        """For `status`: the session, or that there is none at the moment."""
        try:
            return {"session": self.volume.session.number, "session_alive": True}
        except SessionLost:
            return {"session": 0, "session_alive": False}


@asynccontextmanager
async def assembled(config: MountConfig) -> AsyncIterator[Assembly]:
    """Connect, open the volume in a session of its own, check the blob store, and build what serves requests.

    Raises UserError and the errors of metadata, bodies and blob store, each with one line for a person. At the end of
    the context nothing is committed any more: commit before.
    """
    record = MountRecord(
        session=0,
        host=socket.gethostname(),
        pid=os.getpid(),
        mountpoint=config.mountpoint,
        site=config.site,
        version=config.version,
        started_ns=0,
    )
    session = SessionOptions(
        lease_ttl_s=config.session.lease_ttl_s,
        operation_deadline_s=config.session.operation_deadline_s,
        slots=config.session.slots,
        delegations=config.session.delegations,
        write_back=config.session.write_back and not {"sync", "dirsync"} & set(config.kernel_options),
    )
    async with (
        _counted_store(config) as store,
        open_volume(store, config.access.url.volume, config.site, session, record) as volume,
    ):
        stores = SiteStores(volume, store_options(config.body, config.blob_ca_file))
        await _check_store(stores, volume)
        async with open_filesystem(
            volume, stores.open, body_config(config, volume), cache_entries=config.session.entry_cache
        ) as filesystem:
            operations = Operations(filesystem)
            wire = Wire(operations, wire_config(config.body), errno_of)
            operations.guard(wire)
            yield Assembly(store, volume, stores, filesystem, operations, wire)


@asynccontextmanager
async def _counted_store(config: MountConfig) -> AsyncIterator[CountingStore]:
    async with connected_store(config.access) as store:
        yield CountingStore(store)


def body_config(config: MountConfig, volume: Volume) -> BodyConfig:
    """The configuration of bodies, with the part of the cache directory that is for this volume only.

    Blob numbers are unique in a volume, so caches of two volumes must not meet. Raises UserError.
    """
    directory = config.body.cache_dir / f"volume-{volume.superblock.uuid}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"the cache directory {directory} can't be made: {exc.strerror}") from exc
    return replace(config.body, cache_dir=directory)


def store_options(config: BodyConfig, ca_file: str | None) -> BlobStoreOptions:
    """How stores are used. Readers and commits have deadlines of their own: no store gives up before those."""
    patience = RetryPolicy(deadline_s=max(config.commit_deadline_s, config.read_deadline_s))
    # how many blocks are under way is for the mount to say (`upload_limit.py`); packs come on top
    limits = Limits(writes_max=config.uploads_max + IN_FLIGHT_MAX)
    threads = config.uploads_max + config.downloads_max
    return BlobStoreOptions(ca_file=ca_file, retry=patience, limits=limits, threads=threads)


def wire_config(config: BodyConfig) -> WireConfig:
    """What is negotiated with the kernel."""
    plain = WireConfig()
    if not config.passthrough:
        return plain
    lies_on = mount_of(os.path.realpath(config.cache_dir))
    stacked = lies_on is not None and lies_on.fstype == "overlay"
    return replace(plain, set_flags=plain.set_flags | InitFlag.PASSTHROUGH, max_stack_depth=2 if stacked else 1)


async def _check_store(stores: SiteStores, volume: Volume) -> None:
    """A mount whose own store can't be used must not begin. Raises UserError."""
    try:
        await stores.check_site(volume.site)
    except BlobStoreError as exc:
        where = location_of(volume.site, volume.superblock.uuid).where
        raise UserError(f"the blob store of site {volume.site.name!r} ({where}) can't be used: {exc}") from exc
