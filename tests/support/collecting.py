"""The collector in tests: one run over a volume in memory, and what it has left."""

from __future__ import annotations

import trio

from apollofs.blobstore import BlockStore
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.collection import CollectOptions, CollectReport
from apollofs.fs.collector import Collection
from apollofs.fs.command_volume import command_record
from apollofs.metadata.collector import open_collector
from apollofs.metadata.format import list_sites, pages, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, BodyChange
from apollofs.metadata.store import Put, Store
from apollofs.metadata.volume import Volume
from tests.support.bodies import World
from tests.support.volumes import OPTIONS, VOLUME

KEYS = Keys(VOLUME)
AT_ONCE = CollectOptions(grace_s=0)


async def collect(store: Store, blobs: BlockStore, options: CollectOptions = AT_ONCE) -> CollectReport:
    """One run; what it reports."""

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return blobs

    superblock = await read_superblock(store, VOLUME)
    async with (
        open_blob_source(open_store, superblock.block_bytes) as source,
        open_collector(store, VOLUME, command_record("0"), OPTIONS, options.answer_wait_s) as collector,
    ):
        return await Collection(store, KEYS, collector, source, options).run(await list_sites(store, VOLUME))


async def as_others_read_it(world: World, ino: int) -> bytes:
    """The file `f`, by a mount that knows nothing, after everything has been collected that looks like garbage."""
    await collect(world.store, world.blobs)
    async with world.mount("reader") as reader:
        assert (await reader.volume.inner.lookup(ROOT_INO, b"f")).ino == ino
        return await reader.content(ino)


async def objects(blobs: BlockStore) -> list[str]:
    """The names of all objects."""
    return [entry.name async for entry in blobs.list()]


async def keys_in(store: Store, letters: str) -> list[bytes]:
    """Every key of these tables."""
    return [kv.key for letter in letters for kv in [each async for each in pages(store, KEYS.table(letter.encode()))]]


async def clone(store: Store, volume: Volume, source: int, target: int) -> None:
    """Let `target` refer to what `source` is made of, as a clone does: from then on both have keys `r/`."""
    body = await volume.read_body(source)
    held = (await volume.read_body(target)).inode
    blobs = sorted({extent.blob for extent in body.inode.extents})
    await store.txn((), [Put(KEYS.reference(blob, ino), b"") for blob in blobs for ino in (source, target)])
    change = BodyChange(held.body_version, body.inode.size_bytes, extents=body.inode.extents, rewrites_all=True)
    await volume.commit_body(target, change)
