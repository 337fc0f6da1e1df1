"""Blobs as the filesystem sees them: numbers, cut into blocks, each an object in the store of the blob's site.

Other sites may have copies, under the same names (`metadata/replicas.py`). A block is read from the nearest site, and
from another one if that does not answer.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import trio
from xxhash import xxh3_64_intdigest

from apollofs.blobstore import (
    BlobStat,
    BlobStoreError,
    BlobStoreFull,
    BlockStore,
    Buffer,
    CorruptBlob,
    NoSuchBlob,
    RangeUnavailable,
)
from apollofs.blobstore.footer import Footer
from apollofs.blobstore.listing import closing
from apollofs.fs.arrivals import Arrivals, NotComing
from apollofs.fs.errors import BodyError, BodyUnavailable, CorruptBody, MissingBlob
from apollofs.fs.hedging import Hedged
from apollofs.fs.nearness import Nearness
from apollofs.fs.user_error import UserError
from apollofs.fs.workers import share_out
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
T = TypeVar("T")
SITE_SHIFT = 56
SPREAD_MAX = 4096
_BLOCK_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{16}/[0-9a-f]{8}")

OpenStore = Callable[[int], Awaitable[BlockStore]]
"""Opens the store of the site with this id; raises BlobStoreError or MetadataError if there is none."""


CopiesOf = Callable[[int], Awaitable[Sequence[int]]]
"""Which sites have all of a blob besides its own, as far as is known; raises nothing."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a blob: which, and how many bytes it holds (the last one of a blob may be short)."""

    blob: int
    index: int
    length: int

    @property
    def name(self) -> str:
        """The object's name: spread by a hash, and never reused, because blob numbers never are."""
        return f"{xxh3_64_intdigest(self.blob.to_bytes(8, 'big')) & 0xFF:02x}/{self.blob:016x}/{self.index:08x}"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[offset, offset + length)` of a block."""

    block: Block
    offset: int
    length: int


def site_of(blob: int) -> int:
    """Id of the site that holds a blob: the number's top byte."""
    return blob >> SITE_SHIFT


def block_count(blob_length: int, block_bytes: int) -> int:
    return -(-blob_length // block_bytes)


def block_named(name: str, length: int) -> Block | None:
    """The block, of `length` bytes, that an object of this name holds; None if that is no block's name."""
    parts = name.split("/")
    if not _BLOCK_NAME.fullmatch(name):
        return None
    block = Block(int(parts[1], 16), int(parts[2], 16), length)
    return block if block.name == name else None


def block_of(blob: int, blob_length: int, index: int, block_bytes: int) -> Block:
    start = index * block_bytes
    assert 0 <= start < blob_length, f"blob {blob:#x} of {blob_length} bytes has no block {index}"
    return Block(blob, index, min(block_bytes, blob_length - start))


def spans(blob: int, blob_length: int, offset: int, length: int, block_bytes: int) -> list[Span]:
    """Bytes `[offset, offset + length)` of a blob, block by block.

    Raises CorruptBody if they leave the blob: then the extent that asks for them is damaged.
    """
    if offset < 0 or offset + length > blob_length:
        raise CorruptBody(f"blob {blob:#x} has {blob_length} bytes, not the range [{offset}, {offset + length})")
    found = []
    end = offset + length
    while offset < end:
        block = block_of(blob, blob_length, offset // block_bytes, block_bytes)
        within = offset % block_bytes
        count = min(end - offset, block.length - within)
        found.append(Span(block, within, count))
        offset += count
    return found


class BlobSource:
    """Reads and writes blocks, whichever site's store they are in. Stores are opened at their first use.

    Methods raise BodyUnavailable, CorruptBody, MissingBlob; BlobStoreFull from `put_block`; and what `open_store`
    raises, if that is no BlobStoreError. A store that could not be opened is tried again at the next use.
    """

    haste_s = 10.0
    """How long a copy of a block that is written may take to get to another site before that is left for later."""

    def __init__(
        self,
        open_store: OpenStore,
        block_bytes: int,
        here: int = 0,
        copies_of: CopiesOf | None = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        """`here`: the reader's site, 0 if it has none. Without `copies_of` each blob is read at its own site.
        `arrivals`: what is being brought here."""
        self.block_bytes = block_bytes
        self.nearness = Nearness(here)
        self._copies_of = copies_of
        self._arrivals = arrivals
        self._spread: dict[int, set[int]] = {}
        """Blobs that are being written to other sites too; where one block could not be put, the site is taken out."""
        self._open_store = open_store
        self._stores: dict[int, BlockStore] = {}
        self._opening = trio.Lock()

    async def read_block(self, block: Block, offset: int = 0, length: int | None = None) -> memoryview:
        """Verified bytes `[offset, offset + length)` of a block; `length` None: to its end."""

        async def read(site: int) -> memoryview:
            with _translated(block):
                store = await self._store(site)
                return await store.read_block(block.name, block.length, offset, length)

        return await self._nearest(block, block.length - offset if length is None else length, read)

    async def fetch_block(self, block: Block, then: Callable[[memoryview, Footer], T]) -> T:
        """A whole block, verified, and its checksums, given to `then` in the thread that read it; what that returns.

        `then` raises nothing, and may run after the call was cancelled or has been repeated.
        """

        async def fetch(site: int) -> T:
            with _translated(block):
                store = await self._store(site)
                return await store.fetch_block(block.name, block.length, then)

        return await self._nearest(block, block.length, fetch)

    async def _nearest(self, block: Block, size_bytes: int, read: Callable[[int], Awaitable[T]]) -> T:
        home, near = site_of(block.blob), self.nearness
        if self._copies_of is None:
            return await read(home)
        copies_of = self._copies_of
        if self._arrivals is not None and self._arrivals.expects(block.blob) and near.is_well(near.here):
            try:
                return await self._arrivals.read(block.blob, lambda: read(near.here))
            except NotComing as exc:
                if exc.trouble:
                    near.troubled(near.here, exc.trouble)

        async def sites() -> list[int]:
            return near.order((home, *await copies_of(block.blob)))

        first = home if home == near.here and near.is_well(home) else (await sites())[0]
        what = f"block {block.index} of blob {block.blob:#x}"
        return await Hedged(what, size_bytes, read, near).run(first, sites)

    async def read_at(self, block: Block, site: int) -> memoryview:
        """A whole block, verified, from one site's store only."""
        with _translated(block):
            return await (await self._store(site)).read_block(block.name, block.length)

    async def stored_s(self, block: Block) -> float:
        """When a block was put at its own site, in seconds since the epoch by that store's clock. One request."""
        with _translated(block):
            return (await (await self._store(site_of(block.blob))).stat(block.name)).modified_s

    async def put_block(self, block: Block, data: Buffer, site: int = 0) -> None:
        """Store a block, at its own site or (not 0) as a copy at another; durable on return. `data` must not change
        meanwhile. Repeating it is harmless."""
        assert len(data) == block.length

        async def put(site: int) -> None:
            with _translated(block):
                await (await self._store(site)).put(block.name, data)

        await self._put(block, site, put)

    async def put_sealed(self, block: Block, sealed: Buffer, site: int = 0) -> None:
        """As `put_block`, of the block's bytes with their footer behind them (`BlockStore.put_sealed`)."""

        async def put(site: int) -> None:
            with _translated(block):
                await (await self._store(site)).put_sealed(block.name, sealed)

        await self._put(block, site, put)

    def spread(self, blob: int, sites: set[int]) -> None:
        """From now on blocks that are put of this blob, which has none yet, go to these sites too."""
        if sites:
            self._spread[blob] = sites
        while len(self._spread) > SPREAD_MAX:
            self._spread.pop(next(iter(self._spread)))

    def end_spread(self, blob: int) -> set[int]:
        """No more blocks will be put: the other sites that have all that were."""
        return self._spread.pop(blob, set())

    async def _put(self, block: Block, site: int, put: Callable[[int], Awaitable[None]]) -> None:
        """At `site`; or (0) at the blob's own, which alone must succeed, and at those that it is spread to."""
        others = self._spread.get(block.blob) if not site else None
        if not others:
            await put(site or site_of(block.blob))
            return

        async def copy(elsewhere: int) -> None:
            try:
                with trio.fail_after(self.haste_s):
                    await put(elsewhere)
            except (BodyError, BlobStoreError, UserError, MetadataError, trio.TooSlowError) as exc:
                why = str(exc) or f"no answer within {self.haste_s:g} s"
                log.info("block %d of blob %#x is not at site %d yet: %s", block.index, block.blob, elsewhere, why)
                self.nearness.troubled(elsewhere, why)
                others.discard(elsewhere)

        async def one(at: int) -> None:
            await (put if at == site_of(block.blob) else copy)(at)

        sites = (site_of(block.blob), *others)
        await share_out(one, sites, len(sites))

    async def delete_block(self, block: Block, site: int = 0) -> None:
        """Remove a block's object from the store of its own site, or of another one. One that is not there is no
        error."""
        with _translated(block):
            store = await self._store(site or site_of(block.blob))
            await store.delete(block.name)

    async def objects(self, site: int) -> AsyncIterator[BlobStat]:
        """Every object in a site's store, in name order, foreign ones too; the blocks of a blob stand together.

        Raises BodyUnavailable, and what `open_store` raises.
        """
        try:
            store = await self._store(site)
            async with closing(store.list()) as found:
                async for entry in found:
                    yield entry
        except BlobStoreError as exc:
            raise BodyUnavailable(f"the objects of site {site} can't be listed: {exc}") from exc

    async def prepare(self) -> None:
        """Open the own site's store, if there is one, before somebody waits for it. Raises nothing."""
        if not self.nearness.here:
            return
        try:
            await self._store(self.nearness.here)
        except (BlobStoreError, UserError, MetadataError) as exc:
            log.info("the store of this site can't be opened yet: %s", exc)

    async def aclose(self) -> None:
        """Close what was opened. Nobody may be reading or writing any more."""
        stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            await store.aclose()

    async def _store(self, site: int) -> BlockStore:
        store = self._stores.get(site)
        if store is not None:
            return store
        async with self._opening:
            if site not in self._stores:
                self._stores[site] = await self._open_store(site)
            return self._stores[site]


@contextlib.asynccontextmanager
async def open_blob_source(
    open_store: OpenStore,
    block_bytes: int,
    here: int = 0,
    copies_of: CopiesOf | None = None,
    arrivals: Arrivals | None = None,
) -> AsyncIterator[BlobSource]:
    """A BlobSource that closes its stores at the end."""
    source = BlobSource(open_store, block_bytes, here, copies_of, arrivals)
    try:
        yield source
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()


@contextlib.contextmanager
def _translated(block: Block) -> Iterator[None]:
    """Errors of the store as errors of bodies; a full store keeps its own."""
    try:
        yield
    except BlobStoreFull:
        raise
    except BlobStoreError as exc:
        raise _body_error(block, exc) from exc


def _body_error(block: Block, exc: BlobStoreError) -> BodyError:
    what = f"block {block.index} of blob {block.blob:#x}"
    if isinstance(exc, NoSuchBlob):
        return MissingBlob(f"{what} is not in the store")
    if isinstance(exc, CorruptBlob | RangeUnavailable):
        return CorruptBody(f"{what}: {exc}")
    return BodyUnavailable(f"{what}: {exc}")
