"""Values as bodies: small ones go to etcd as they are, larger ones are a blob in the site's store."""

from __future__ import annotations

import logging

import trio

from apollofs.blobstore import BlobStoreError, BlobStoreFull
from apollofs.fs.blobs import BlobSource, Block, Span, block_count, block_of, spans
from apollofs.fs.errors import BodyError
from apollofs.fs.user_error import UserError
from apollofs.fs.workers import share_out
from apollofs.metadata.errors import FileTooLarge, MetadataError
from apollofs.metadata.extents import pieces
from apollofs.metadata.ops.put_values import NewBody
from apollofs.metadata.records import Body, Extent, Owner
from apollofs.metadata.session import Session

log = logging.getLogger(__name__)
DISCARD_S = 5.0
TRANSFERS_MAX = 8
"""Blocks of one client on their way at once."""


class ValueBodies:
    """Stores and loads whole values. A value is in memory once; `bytes_max` bounds it."""

    def __init__(self, source: BlobSource, inline_bytes_max: int, bytes_max: int) -> None:
        self._source = source
        self._inline_bytes_max = inline_bytes_max
        self._bytes_max = bytes_max
        self._transfers = trio.CapacityLimiter(TRANSFERS_MAX)

    def check(self, size_bytes: int) -> None:
        """Raises FileTooLarge for what is no value."""
        if size_bytes > self._bytes_max:
            raise FileTooLarge(f"a value of {size_bytes} bytes; at most {self._bytes_max} are read or written at once")

    def is_uploaded(self, size_bytes: int) -> bool:
        """Whether a value of this size is a blob: larger than the volume's inline limit."""
        return size_bytes > self._inline_bytes_max

    async def store(self, data: bytes, session: Session, mode: int, owner: Owner) -> NewBody:
        """What a transaction of `session` makes a value of. Uploads what `is_uploaded`; if it is never committed, that
        is garbage under the session's number: `discard` it where that is sure.

        Raises FileTooLarge, BodyUnavailable, BlobStoreFull.
        """
        self.check(len(data))
        if not self.is_uploaded(len(data)):
            return NewBody(session.new_ino(), len(data), data, (), mode, owner)
        blob, size = session.new_blob(), len(data)
        view = memoryview(data)

        async def upload(block: Block) -> None:
            start = block.index * self._source.block_bytes
            async with self._transfers:
                await self._source.put_block(block, view[start : start + block.length])

        body = NewBody(session.new_ino(), size, None, (Extent(0, size, blob, 0, size),), mode, owner)
        blocks = self._blocks(blob, size)
        try:
            await share_out(upload, blocks, min(len(blocks), TRANSFERS_MAX))
        except (BodyError, BlobStoreFull):
            await self.discard(body)
            raise
        return body

    async def discard(self, body: NewBody) -> None:
        """Delete what `store` has uploaded: surely it was not committed, and never will be. Best effort, bounded: what
        stays is garbage under the session's number. Raises nothing."""

        async def delete(block: Block) -> None:
            async with self._transfers:
                await self._source.delete_block(block)

        blocks = [block for extent in body.extents for block in self._blocks(extent.blob, extent.blob_length)]
        try:
            with trio.move_on_after(DISCARD_S):
                await share_out(delete, blocks, min(len(blocks), TRANSFERS_MAX))
        except (BodyError, BlobStoreError, UserError, MetadataError) as exc:
            log.info("a value that was not put stays in the store until it is collected: %s", exc)

    def _blocks(self, blob: int, size: int) -> list[Block]:
        count = block_count(size, self._source.block_bytes)
        return [block_of(blob, size, index, self._source.block_bytes) for index in range(count)]

    async def load(self, body: Body) -> bytes:
        """All bytes of a body, verified.

        Raises FileTooLarge, BodyUnavailable, CorruptBody; MissingBlob where the body is not the newest any more, and
        what it had has been collected.
        """
        size = body.inode.size_bytes
        if body.inode.is_inline and len(body.inline) == size:
            return body.inline
        self.check(size)
        data = bytearray(size)
        data[: len(body.inline)] = body.inline
        wanted: list[tuple[int, Span]] = []
        for piece in pieces(body.inode.extents, 0, size):
            extent, at = piece.extent, piece.offset
            if extent is None:
                continue
            for span in spans(
                extent.blob, extent.blob_length, extent.blob_offset, piece.length, self._source.block_bytes
            ):
                wanted.append((at, span))
                at += span.length

        async def fetch(part: tuple[int, Span]) -> None:
            at, span = part
            async with self._transfers:
                data[at : at + span.length] = await self._source.read_block(span.block, span.offset, span.length)

        await share_out(fetch, wanted, min(len(wanted), TRANSFERS_MAX))
        return bytes(data)
