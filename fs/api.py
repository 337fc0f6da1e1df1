"""apollofs from Python, without a mount. What other programs import; `docs/KV.md` is its manual.

from apollofs.fs.api import open_volume, open_volume_sync
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.command_volume import command_record
from apollofs.fs.config import OPERATION_DEADLINE_S, check_bounds, check_deadline
from apollofs.fs.connect import connected_store
from apollofs.fs.kv import Change, Client, Entry, KeyEvent, KeyValues, KeyWatch, Page, Value
from apollofs.fs.kv_sync import SyncClient, SyncKeyValues, open_client_sync
from apollofs.fs.meta_url import MetaAccess, parse_meta_url, resolve_password
from apollofs.fs.site_stores import SiteStores
from apollofs.fs.ungrouped import ungrouped
from apollofs.fs.user_error import UserError
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata import volume as metadata
from apollofs.metadata.errors import (
    Compacted,
    DeadlineExceeded,
    FileTooLarge,
    MetadataError,
    NoSuchEntry,
    RevisionConflict,
    SessionLost,
)
from apollofs.metadata.format import list_sites
from apollofs.metadata.records import Owner, SiteRecord
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store

__all__ = [
    "open_volume",
    "open_volume_sync",
    "ClientOptions",
    "Client",
    "KeyValues",
    "SyncClient",
    "SyncKeyValues",
    "Value",
    "Entry",
    "Page",
    "KeyEvent",
    "KeyWatch",
    "Change",
    "MetadataError",
    "NoSuchEntry",
    "RevisionConflict",
    "FileTooLarge",
    "Compacted",
    "SessionLost",
    "DeadlineExceeded",
    "UserError",
]
VALUE_BYTES_DEFAULT = 256 << 20


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How a program works on a volume without a mount. Raises ConfigError for what is out of its bounds."""

    password: str = ""
    """Of the etcd user in the address."""
    password_file: str = ""
    blob_ca_file: str | None = None
    """Authority for S3 endpoints; None: the system's."""
    value_bytes_max: int = VALUE_BYTES_DEFAULT
    """Larger values are refused, reading and writing: each is in memory as a whole."""
    lease_ttl_s: int = 15
    """A client that was not heard of for this long has lost its session, and its right to write."""
    operation_deadline_s: float = OPERATION_DEADLINE_S
    """More than the lease: what another client that has died held is free only when its lease has ended."""
    delegations: bool = True
    """Whether to cache directories that nobody else changes; without, every get asks etcd."""
    slots: int = 16
    """Transactions that may be in flight at once."""

    def __post_init__(self) -> None:
        check_bounds("value_bytes_max", self.value_bytes_max, 1, 16 << 30)
        check_bounds("lease_ttl_s", self.lease_ttl_s, 2, 600)
        check_bounds("operation_deadline_s", self.operation_deadline_s, 1, 1200)
        check_bounds("slots", self.slots, 1, 64)
        check_deadline(self.operation_deadline_s, self.lease_ttl_s)

    def session(self) -> SessionOptions:
        """Nothing is answered ahead of the store: revisions must be the store's."""
        return SessionOptions(self.lease_ttl_s, self.operation_deadline_s, self.slots, self.delegations, False)


@asynccontextmanager
async def open_volume(
    meta_url: str, *, site: str = "", options: ClientOptions = ClientOptions()
) -> AsyncIterator[Client]:
    """Open a volume for a program, in a session of its own that ends with the block. In a trio run.

    `site` is where large values go; it may be left out where the volume has one site. Credentials of its store come
    from the usual AWS places. Raises UserError (with one line: what can't be reached, or does not exist), NotFormatted,
    UnknownSite. What the block itself raises leaves it as it is.
    """
    access = resolve_password(parse_meta_url(meta_url), options.password, options.password_file)
    with ungrouped():
        async with connected_store(access) as store, client_of(store, access, site, options) as client:
            yield client


@asynccontextmanager
async def client_of(store: Store, access: MetaAccess, site: str, options: ClientOptions) -> AsyncIterator[Client]:
    """As `open_volume`, on a store that is connected."""
    name = site or await _only_site(store, access.url.volume)
    record = replace(command_record(_version()), site=name)
    async with metadata.open_volume(store, access.url.volume, name, options.session(), record) as volume:
        stores = SiteStores(volume, BlobStoreOptions(ca_file=options.blob_ca_file))
        block = volume.superblock
        async with open_blob_source(stores.open, block.block_bytes) as source:
            bodies = ValueBodies(source, block.inline_bytes_max, options.value_bytes_max)
            yield Client(volume, bodies, Owner(os.geteuid(), os.getegid()), options.operation_deadline_s)


async def _only_site(store: Store, volume: str) -> str:
    sites = await list_sites(store, volume) or [SiteRecord(0, "", ())]  # of a volume that does not exist
    if len(sites) > 1:
        raise UserError(f"volume {volume!r} has {len(sites)} sites: say at which one this program is")
    return sites[0].name


def _version() -> str:
    try:
        return importlib.metadata.version("apollofs")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def open_volume_sync(
    meta_url: str, *, site: str = "", options: ClientOptions = ClientOptions()
) -> Iterator[SyncClient]:
    """As `open_volume`, for programs without trio: a thread runs it, until the block ends. Any thread may call.

    After a fork the child can't use what its parent has opened (RuntimeError): it opens its own.
    """
    with open_client_sync(lambda: open_volume(meta_url, site=site, options=options)) as client:
        yield client
