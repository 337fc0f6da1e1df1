"""Reader: a file's bytes, put together from inline bytes, extents and holes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from apollofs.fs.blobs import Span, spans
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyError, BodyUnavailable
from apollofs.metadata import extents
from apollofs.metadata.records import Body, Extent


@dataclass(slots=True)
class AccessPattern:
    """What one handle has read so far: tells sequential reading from scattered."""

    expected_offset: int = 0
    streak: int = 0
    """Reads in a row that went on where the last one ended; the kernel may send a few out of order."""

    def note(self, offset: int, size: int, slack: int) -> bool:
        """A read begins; whether it looks like a part of sequential reading."""
        sequential = abs(offset - self.expected_offset) <= slack
        self.streak = self.streak + 1 if sequential else 0
        self.expected_offset = max(self.expected_offset, offset + size) if sequential else offset + size
        return sequential


class Reader:
    """Reads bodies through the block cache. Knows nothing of open files and what was written to them."""

    def __init__(self, cache: BlockCache, config: BodyConfig, block_bytes: int) -> None:
        self._cache = cache
        self._block_bytes = block_bytes
        self._deadline_s = config.read_deadline_s
        self._read_ahead_max = config.read_ahead_blocks_max

    async def pread(self, body: Body, offset: int, size: int, pattern: AccessPattern | None = None) -> bytes:
        """Bytes `[offset, offset + size)`, fewer only at the end of the file.

        `pattern` is the handle's; None: a read of this program, as of what is wanted whole. Raises BodyUnavailable
        (also at the deadline), CorruptBody, MissingBlob. Cancelled, nothing is left behind but a fuller cache.
        """
        size = min(size, body.inode.size_bytes - offset)
        if size <= 0:
            return b""
        if body.inode.is_inline:
            return body.inline[offset : offset + size].ljust(size, b"\0")
        found = extents.pieces(body.inode.extents, offset, size)
        wanted = [span for piece in found if piece.extent is not None for span in self._spans(piece.extent)]
        sequential = pattern is None or pattern.note(offset, size, self._block_bytes)
        if pattern is not None and sequential:
            self._read_ahead(body, offset + size, pattern)
        blocks = iter(await self._fetch(wanted, whole=sequential))
        parts: list[bytes | memoryview] = []
        for piece in found:
            if piece.extent is None:
                parts.append(bytes(piece.length))
            else:
                parts.extend(next(blocks) for _ in self._spans(piece.extent))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _spans(self, extent: Extent) -> list[Span]:
        return spans(extent.blob, extent.blob_length, extent.blob_offset, extent.length, self._block_bytes)

    async def _fetch(self, wanted: Sequence[Span], *, whole: bool) -> list[memoryview]:
        found: dict[int, memoryview] = {}

        async def fetch(index: int) -> None:
            span = wanted[index]
            found[index] = await self._cache.read(span.block, span.offset, span.length, whole=whole)

        try:
            with trio.fail_after(self._deadline_s):
                if len(wanted) == 1:
                    await fetch(0)
                else:
                    await _each(fetch, len(wanted))
        except trio.TooSlowError as exc:
            raise BodyUnavailable(f"a read did not end within {self._deadline_s:g} s") from exc
        return [found[index] for index in range(len(wanted))]

    def _read_ahead(self, body: Body, offset: int, pattern: AccessPattern) -> None:
        """Start what a sequential reader will want next; the window grows with the streak."""
        blocks_max = min(pattern.streak, self._read_ahead_max)
        ahead = extents.pieces(body.inode.extents, offset, blocks_max * self._block_bytes) if blocks_max > 0 else []
        left = blocks_max
        for piece in ahead:
            if piece.extent is None:
                continue
            for span in self._spans(piece.extent)[:left]:
                self._cache.prefetch(span.block)
                left -= 1
            if left <= 0:
                break


async def _each(call: Callable[[int], Awaitable[None]], count: int) -> None:
    """`call` with 0 to `count` - 1, side by side. Raises the first error itself, not a group."""
    errors: list[BodyError] = []

    async def one(index: int) -> None:
        try:
            await call(index)
        except BodyError as exc:
            errors.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(one, index)
    if errors:
        raise errors[0]
