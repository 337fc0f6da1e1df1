"""Reader: a file's bytes, put together from inline bytes, extents and holes.

Bodies of more than about 1 MiB are read through their image (`fs/images`), smaller ones block by block (`fs/cache.py`);
so are larger ones where the disk of the cache can't be used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import trio

from apollofs.blobstore import Buffer
from apollofs.fs.access import AccessPattern
from apollofs.fs.blobs import Span, spans
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.images import Image, ImageStore, is_large
from apollofs.fs.workers import share_out
from apollofs.metadata import extents
from apollofs.metadata.records import Body, Extent

__all__ = ["AccessPattern", "Reader"]

SLACK_BYTES = 2 << 20
"""How far from where a stream ended a read still goes on with it."""
IMAGES_HELD_MAX = 256
STRIDES_AHEAD = 4
FETCHES_MAX = 16
"""Blocks that one read waits for side by side."""


class Reader:
    """Reads bodies through the caches. Knows nothing of open files and what was written to them."""

    def __init__(self, cache: BlockCache, images: ImageStore, config: BodyConfig, block_bytes: int) -> None:
        self._cache = cache
        self._images = images
        self._block_bytes = block_bytes
        self._deadline_s = config.read_deadline_s
        blocks = config.downloads_max if config.read_ahead_blocks_max is None else config.read_ahead_blocks_max
        self._read_ahead_bytes_max = blocks * block_bytes
        self._held: OrderedDict[int, tuple[Body, Image]] = OrderedDict()
        """By inode: the image that its last read was of. It stays open until `forget`."""

    async def pread(self, body: Body, offset: int, size: int, pattern: AccessPattern | None = None) -> Buffer:
        """Bytes `[offset, offset + size)`, fewer only at the end of the file.

        `pattern` is the handle's; None: a read of this program, as of what is wanted whole. Raises BodyUnavailable
        (also at the deadline), CorruptBody, MissingBlob. Cancelled, nothing is left behind but a fuller cache.
        """
        size = min(size, body.inode.size_bytes - offset)
        if size <= 0:
            return b""
        if body.inode.is_inline:
            return body.inline[offset : offset + size].ljust(size, b"\0")
        if is_large(body):
            image = self._image_held(body) or await self._open_image(body)
            if image is not None:
                return await self._read_image(image, offset, size, pattern)
        return await self._read_blocks(body, offset, size, pattern)

    def prefers_direct(self, body: Body) -> bool:
        """Whether an open of the body is better served past the kernel's page cache: it is large, and not all of it is
        here yet. The daemon reads ahead, no page is kept twice, and the next open may pass through. No checkpoint."""
        return is_large(body) and not self._images.find(body)

    def opened(self, body: Body) -> None:
        """The body will probably be read: a small one is fetched whole at once. No checkpoint; raises nothing."""
        if not is_large(body):
            for span in self._spans_of(body.inode.extents):
                if _is_most(span):
                    self._cache.prefetch(span.block)

    async def fetch_small(self, body: Body) -> None:
        """Have a small body here; of a pack, when several of it are wanted. Raises as `pread`, but for the deadline."""
        if not is_large(body):
            for span in self._spans_of(body.inode.extents):
                await self._cache.fetch(span.block, whole=_is_most(span))

    def forget(self, ino: int) -> None:
        """Nobody has the inode open any more. No checkpoint."""
        held = self._held.pop(ino, None)
        if held is not None:
            self._images.release(held[1])

    # -- large: images -----------------------------------------------------------------------------------------------

    def _image_held(self, body: Body) -> Image | None:
        held = self._held.get(body.inode.ino)
        if held is None:
            return None
        known, image = held
        same = known.inode.extents is body.inode.extents or known.inode.extents == body.inode.extents
        if same and image.size_bytes == body.inode.size_bytes and not image.is_detached:
            return image
        self.forget(body.inode.ino)
        return None

    async def _open_image(self, body: Body) -> Image | None:
        image = await self._images.open(body)
        if image is None:
            return None
        self.forget(body.inode.ino)
        self._held[body.inode.ino] = (body, image)
        if len(self._held) > IMAGES_HELD_MAX:
            self._images.release(self._held.popitem(last=False)[1][1])
        return image

    async def _read_image(self, image: Image, offset: int, size: int, pattern: AccessPattern | None) -> Buffer:
        whole = pattern is None or pattern.note(offset, size, SLACK_BYTES) or size >= self._block_bytes // 2
        if pattern is not None and not image.is_complete:
            self._fetch_ahead(image, offset, size, pattern)
        at_hand = image.read_now(offset, size)
        if at_hand is not None:
            return at_hand
        self._images.hold(image)
        try:
            with trio.fail_after(self._deadline_s):
                data = await image.read(offset, size, whole=whole)
        except trio.TooSlowError as exc:
            raise self._too_slow() from exc
        finally:
            self._images.release(image)
        return data

    def _fetch_ahead(self, image: Image, offset: int, size: int, pattern: AccessPattern) -> None:
        ahead = min(pattern.ahead_bytes, self._read_ahead_bytes_max)
        if ahead:
            image.prefetch(offset + size, ahead)
        elif pattern.stride and self._read_ahead_bytes_max:
            for step in range(1, STRIDES_AHEAD + 1):
                start = offset + step * pattern.stride
                if 0 <= start < image.size_bytes:
                    image.prefetch(start, size)

    # -- small: blocks -----------------------------------------------------------------------------------------------

    async def _read_blocks(self, body: Body, offset: int, size: int, pattern: AccessPattern | None) -> bytes:
        found = extents.pieces(body.inode.extents, offset, size)
        wanted = list(self._spans_of(piece.extent for piece in found if piece.extent is not None))
        sequential = pattern is None or pattern.note(offset, size, self._block_bytes)
        if pattern is not None and sequential:
            self._read_ahead(body, offset + size, pattern)
        blocks = iter(await self._fetch(wanted, whole=sequential, small=not is_large(body)))
        parts: list[bytes | memoryview] = []
        for piece in found:
            if piece.extent is None:
                parts.append(bytes(piece.length))
            else:
                parts.extend(next(blocks) for _ in self._spans(piece.extent))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _spans(self, extent: Extent) -> list[Span]:
        return spans(extent.blob, extent.blob_length, extent.blob_offset, extent.length, self._block_bytes)

    def _spans_of(self, listed: Iterable[Extent]) -> Iterator[Span]:
        for extent in listed:
            yield from self._spans(extent)

    async def _fetch(self, wanted: Sequence[Span], *, whole: bool, small: bool) -> list[memoryview]:
        """`small`: the file is, so a span that is little of its block is a member of a pack: the others are fetched
        with it when several of them are read."""
        found: dict[int, memoryview] = {}

        async def fetch(index: int) -> None:
            span = wanted[index]
            found[index] = await self._cache.read(
                span.block, span.offset, span.length, whole=whole and (not small or _is_most(span))
            )

        try:
            with trio.fail_after(self._deadline_s):
                if len(wanted) == 1:
                    await fetch(0)
                else:
                    await share_out(fetch, range(len(wanted)), min(len(wanted), FETCHES_MAX))
        except trio.TooSlowError as exc:
            raise self._too_slow() from exc
        return [found[index] for index in range(len(wanted))]

    def _too_slow(self) -> BodyUnavailable:
        return BodyUnavailable(f"a read did not end within {self._deadline_s:g} s")

    def _read_ahead(self, body: Body, offset: int, pattern: AccessPattern) -> None:
        """Start what a sequential reader will want next; the window grows with what it has read in a row."""
        ahead = min(pattern.ahead_bytes, self._read_ahead_bytes_max)
        for piece in extents.pieces(body.inode.extents, offset, ahead):
            if piece.extent is not None:
                for span in self._spans(piece.extent):
                    self._cache.prefetch(span.block)


def _is_most(span: Span) -> bool:
    """Whether a span is so much of its block that the block is worth having for it alone."""
    return span.length * 2 >= span.block.length
