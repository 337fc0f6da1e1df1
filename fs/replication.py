"""Getting bodies to the sites that shall hold them: a small port, and one implementation that copies by itself.

A copy is the same objects under the same names in the other site's store; `b/<blob>` says that it is complete
(`metadata/replicas.py` has the rules). What a site agent has copied meanwhile is seen there, and not copied again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from apollofs.blobstore import BlobStoreError, BlockStore, Buffer
from apollofs.blobstore.footer import Footer, pack_footer
from apollofs.fs.blobs import BlobSource, Block, block_count, block_of, site_of
from apollofs.fs.errors import BodyUnavailable, MissingBlob
from apollofs.fs.workers import share_out
from apollofs.metadata.copies import NOWHERE, Copies
from apollofs.metadata.records import Extent
from apollofs.metadata.replicas import Referent, Replicas
from apollofs.metadata.session import Session

log = logging.getLogger(__name__)
BLOCKS_AT_ONCE = 8
"""Of one blob; each is in memory."""
FINISH_ATTEMPTS = 16
"""How often others may note copies of the same blobs at the same time."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file with a body in blobs, and the key that proves, unchanged, that it refers to them."""

    referent: Referent
    extents: tuple[Extent, ...]


@dataclass(slots=True)
class Lacking:
    """A blob that some sites should have and don't."""

    blob: int
    length: int
    referent: Referent
    sites: tuple[int, ...]
    copies: Copies = NOWHERE
    referred: set[int] = field(default_factory=set)
    """Indices of its blocks that files refer to; others may never have been stored."""


class Replication(Protocol):
    """Methods raise BodyError, BlobStoreError, MetadataError."""

    async def lacking(self, files: Sequence[StoredFile], sites: Collection[int]) -> list[Lacking]:
        """The blobs of these files that some of these sites have not completely."""
        ...

    async def provide(self, lacking: Sequence[Lacking]) -> None:
        """Have them copied. On return either `lacking` doesn't name them any more, or their files have changed."""
        ...


class DirectReplication:
    """Copies from here, store to store. `open_store` as `SiteStores.open`; `copied` hears of bytes."""

    def __init__(
        self,
        source: BlobSource,
        replicas: Replicas,
        session: Session,
        open_store: Callable[[int], Awaitable[BlockStore]],
        copied: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._replicas = replicas
        self._session = session
        self._open_store = open_store
        self._copied = copied
        self._stores: dict[int, BlockStore] = {}

    async def lacking(self, files: Sequence[StoredFile], sites: Collection[int]) -> list[Lacking]:
        """See `Replication`. One request for a hundred blobs."""
        found: dict[int, Lacking] = {}
        size = self._source.block_bytes
        for file in files:
            for extent in file.extents:
                one = found.setdefault(extent.blob, Lacking(extent.blob, extent.blob_length, file.referent, ()))
                end = extent.blob_offset + extent.length
                one.referred.update(range(extent.blob_offset // size, block_count(end, size)))
        known = await self._replicas.read(found)
        for one in found.values():
            one.copies = known[one.blob]
            there = {site_of(one.blob), *one.copies.complete}
            one.sites = tuple(site for site in sites if site not in there)
        return [one for one in found.values() if one.sites]

    async def provide(self, lacking: Sequence[Lacking]) -> None:
        """See `Replication`. Each copy is announced, made, and noted; cancelled, the next call goes on."""
        for site in sorted({site for one in lacking for site in one.sites}):
            await self._provide(site, {one.blob: one for one in lacking if site in one.sites})

    async def _provide(self, site: int, blobs: Mapping[int, Lacking]) -> None:
        known = await self._replicas.read(blobs)
        wanted = {blob: (known[blob], one.referent) for blob, one in blobs.items() if site not in known[blob].complete}
        begun = await self._replicas.begin(self._session, site, wanted)
        store = await self._store_at(site)
        for blob in begun:
            await self._copy(blobs[blob], store)
        await self._finish(site, begun, blobs, store)

    async def _copy(self, one: Lacking, store: BlockStore) -> None:
        async def copy(block: Block) -> None:
            try:
                sealed = await self._source.fetch_block(block, partial(_sealed, block.name))
            except MissingBlob:
                if block.index in one.referred:
                    raise
                return
            try:
                await store.put_sealed(block.name, sealed)
            except BlobStoreError as exc:
                raise BodyUnavailable(f"block {block.index} of blob {block.blob:#x} can't be stored: {exc}") from exc
            self._copied(block.length)

        count = block_count(one.length, self._source.block_bytes)
        blocks = (block_of(one.blob, one.length, index, self._source.block_bytes) for index in range(count))
        await share_out(copy, blocks, min(count, BLOCKS_AT_ONCE))

    async def _finish(
        self, site: int, copied: dict[int, Copies], blobs: Mapping[int, Lacking], store: BlockStore
    ) -> None:
        """Note the copies; remove those of blobs that were collected meanwhile."""
        for _ in range(FINISH_ATTEMPTS):
            done = await self._replicas.finish(self._session, site, copied)
            left = copied.keys() - done.keys()
            if not left:
                return
            copied = await self._replicas.read(left)
            for blob in [blob for blob, copies in copied.items() if site not in copies.sites]:
                del copied[blob]
                for index in range(block_count(blobs[blob].length, self._source.block_bytes)):
                    await store.delete(block_of(blob, blobs[blob].length, index, self._source.block_bytes).name)
        log.info("%d copies at site %d are noted later: others keep noting theirs", len(copied), site)

    async def _store_at(self, site: int) -> BlockStore:
        if site not in self._stores:
            self._stores[site] = await self._open_store(site)
        return self._stores[site]

    async def aclose(self) -> None:
        """Close the stores that were opened here."""
        for store in self._stores.values():
            await store.aclose()
        self._stores.clear()


def _sealed(name: str, data: memoryview, footer: Footer) -> Buffer:
    """The object as it is, its checksums included. Called in a thread."""
    return b"".join((data, pack_footer(name, footer)))
