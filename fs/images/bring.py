"""How a block of an image comes here: from the store in one request and one thread, or put together from pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from apollofs.blobstore.footer import Footer, footer_of
from apollofs.fs.blobs import BlobSource, Block, spans
from apollofs.fs.cache import BlockCache
from apollofs.fs.fetching import Fetch
from apollofs.fs.images.files import ImageFiles, is_full
from apollofs.fs.images.image import Image
from apollofs.metadata import extents


@dataclass(frozen=True, slots=True)
class Put:
    """What became of a block that was fetched."""

    data: memoryview
    stored: bool = False
    lacking: int = 0
    """Bytes of room that the disk lacks for it."""
    error: OSError | None = None


class BlockBringer:
    """Made by `ImageStore`."""

    def __init__(
        self,
        source: BlobSource,
        cache: BlockCache,
        files: ImageFiles,
        downloads: trio.CapacityLimiter,
        threads: trio.CapacityLimiter,
    ) -> None:
        self._source = source
        self._cache = cache
        self._files = files
        self._downloads = downloads
        self._composing = trio.CapacityLimiter(int(downloads.total_tokens))
        self._threads = threads
        self._token = trio.lowlevel.current_trio_token()
        self.fetched = 0

    async def bring(self, image: Image, index: int, fetch: Fetch, *, takes: bool) -> Put:
        """Get a block to who waits, and if `takes` into the file. Raises BodyError."""
        start, length = index * image.block_bytes, image.file.map.length(index)
        block = _as_block(image.extents, start, length, image.block_bytes)
        put = self._putting(image, index, fetch, takes=takes)
        if block is not None and block not in self._cache:
            async with self._downloads:
                done = await self._source.fetch_block(block, put)
            self.fetched += 1
        else:
            # not under `_downloads`: the block cache waits for those
            async with self._composing:
                data = memoryview(await self.read_range(image.extents, start, length))
                done = await trio.to_thread.run_sync(lambda: put(data, footer_of(data)), limiter=self._threads)
            if block is not None and done.stored:
                await self._cache.discard(block)
        fetch.arrived(done.data)
        return done

    def _putting(self, image: Image, index: int, fetch: Fetch, *, takes: bool) -> Callable[[memoryview, Footer], Put]:
        """What a thread that has the block calls: it tells who waits, then writes if the bound `takes` it."""
        is_hole = not _has_data(image.extents, index * image.block_bytes, image.file.map.length(index))

        def put(data: memoryview, footer: Footer) -> Put:
            fetch.tell(self._token, data)
            if not takes:
                return Put(data)
            try:
                lacking = self._files.lacking(len(data))
                if lacking > 0 and not is_hole:
                    return Put(data, lacking=lacking)
                return Put(data, stored=image.file.store(index, None if is_hole else data, footer))
            except OSError as exc:
                if is_full(exc):
                    return Put(data, lacking=len(data))
                return Put(data, error=exc)

        return put

    async def read_range(self, layout: extents.Extents, offset: int, length: int) -> bytes:
        """Bytes of the body from where its extents are, by way of the block cache for what is smaller than a block."""
        parts: list[bytes | memoryview] = []
        for piece in extents.pieces(layout, offset, length):
            if piece.extent is None:
                parts.append(bytes(piece.length))
                continue
            one = piece.extent
            found = spans(one.blob, one.blob_length, one.blob_offset, one.length, self._source.block_bytes)
            parts += [await self._cache.read(span.block, span.offset, span.length, whole=False) for span in found]
        return b"".join(parts)


def _as_block(layout: extents.Extents, start: int, length: int, block_bytes: int) -> Block | None:
    """The stored block that a block of the body is, byte for byte; None if it is put together otherwise."""
    pieces = extents.pieces(layout, start, length)
    if len(pieces) != 1 or pieces[0].extent is None:
        return None
    one = pieces[0].extent
    found = spans(one.blob, one.blob_length, one.blob_offset, one.length, block_bytes)
    whole = len(found) == 1 and found[0].offset == 0 and found[0].length == found[0].block.length
    return found[0].block if whole else None


def _has_data(layout: extents.Extents, start: int, length: int) -> bool:
    at = extents.next_data(layout, start)
    return at is not None and at < start + length
