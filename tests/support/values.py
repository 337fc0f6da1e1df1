"""Clients of the key-value store on a test's own volume and blobs, without a mount."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from apollofs.blobstore import BlockStore
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.kv import Client
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from tests.support.volumes import ME, OPTIONS, mounted

CLIENT = replace(OPTIONS, write_back=False)
VALUE_BYTES_MAX = 1 << 20


@asynccontextmanager
async def kv_client(store: Store, blobs: BlockStore, options: SessionOptions = CLIENT) -> AsyncIterator[Client]:
    """One more client of VOLUME, in a session of its own."""

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return blobs

    async with mounted(store, options) as volume, open_blob_source(open_store, volume.superblock.block_bytes) as source:
        bodies = ValueBodies(source, volume.superblock.inline_bytes_max, VALUE_BYTES_MAX)
        yield Client(volume, bodies, ME, options.operation_deadline_s)
