"""Sealing on put, verifying on read: no byte leaves here that is not the byte that was put.

`footer.py` has the format. Callers see plain data and its sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import trio

from .block_port import BlockStore
from .errors import CorruptBlob, RangeUnavailable
from .footer import (
    CHUNK_BYTES,
    Footer,
    check_chunks,
    data_length_of,
    footer_length,
    make_footer,
    parse_footer,
    sealed_length,
)
from .listing import closing
from .names import check_name, check_range
from .port import BlobStat, BlobStore, Buffer

T = TypeVar("T")

FOOTERS_MAX: Final = 4096
"""Footers remembered; one of a 16 MiB block takes about 3 KB of memory."""

NEAR_END_BYTES: Final = 2 * CHUNK_BYTES
"""Reading on to the end, if no more than this lies between, is cheaper than a request for the footer alone."""

IN_THREAD_BYTES: Final = 1 << 20
"""From here hashing leaves the event loop: it takes 40 us a MiB and more, and releases the GIL."""

UNSEALED: Final = -1
"""The size that `list` gives an object which no seal can be part of, so that whoever cleans up sees it."""


class VerifyingStore(BlockStore):
    """See `block_port.BlockStore`. `threads` bounds the hashing at once."""

    def __init__(self, inner: BlobStore, *, threads: int = 4, footers_max: int = FOOTERS_MAX) -> None:
        self._inner = inner
        self._limiter = trio.CapacityLimiter(threads)
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._footers_max = footers_max

    async def put(self, name: str, data: Buffer) -> None:
        """As the port says. `data` is copied once, into immutable bytes, so a cancelled put shares nothing."""
        check_name(name)
        await self._inner.put(name, await self._compute(partial(_seal, name, data), len(data)))

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        await self._inner.put(check_name(name), sealed)

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """As the port says. A part takes a `stat` more than `read_block`, unless its footer is remembered."""
        check_range(offset, length)
        if offset == 0 and length is None:
            return bytes(await self._read_whole(name))
        footer = self._footers.get(name)
        data_length = footer.data_length if footer is not None else (await self.stat(name)).size_bytes
        return bytes(await self.read_block(name, data_length, offset, length))

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        check_name(name)
        check_range(offset, length)
        end = max(offset, data_length) if length is None else offset + length
        if end > data_length:
            raise RangeUnavailable(f"{name!r} has {data_length} bytes, not the range [{offset}, {end})")
        first = offset // CHUNK_BYTES
        start = first * CHUNK_BYTES
        stop = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, data_length)
        footer = self._remembered(name, data_length)
        if footer is None and data_length - stop <= NEAR_END_BYTES:
            data = await self._read_to_end(name, data_length, start)
        else:
            if footer is None:
                footer = await self._fetch_footer(name, data_length)
            if start >= stop:
                await trio.lowlevel.checkpoint()
                return memoryview(b"")
            data = memoryview(await self._read_exactly(name, start, stop - start))
            await self._check(name, footer, first, data)
        return data[offset - start : end - start]

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        check_name(name)
        call = partial(_unseal, name, data_length, then)
        try:
            return await self._inner.read_into(name, sealed_length(data_length), call)
        except RangeUnavailable as exc:
            raise _too_short(name) from exc

    async def stat(self, name: str) -> BlobStat:
        """As the port says; the size is that of the data, computed and not verified."""
        found = await self._inner.stat(name)
        data_length = data_length_of(found.size_bytes)
        if data_length is None:
            raise CorruptBlob(f"{name!r}: {found.size_bytes} bytes are no length of a sealed object")
        return replace(found, size_bytes=data_length)

    async def delete(self, name: str) -> None:
        self._footers.pop(name, None)
        await self._inner.delete(name)

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        """As the port says; the size is `UNSEALED` for an object of somebody else."""
        async with closing(self._inner.list(prefix, start_after)) as found:
            async for entry in found:
                data_length = data_length_of(entry.size_bytes)
                yield replace(entry, size_bytes=UNSEALED if data_length is None else data_length)

    async def aclose(self) -> None:
        self._footers.clear()
        await self._inner.aclose()

    async def _read_whole(self, name: str) -> memoryview:
        sealed = memoryview(await self._inner.read(check_name(name)))
        data_length = data_length_of(len(sealed))
        if data_length is None:
            raise CorruptBlob(f"{name!r}: {len(sealed)} bytes are no length of a sealed object")
        return await self._open_tail(name, data_length, 0, sealed)

    async def _read_to_end(self, name: str, data_length: int, start: int) -> memoryview:
        """The data from `start`, a chunk's start, and the footer behind it, in one request."""
        tail = memoryview(await self._read_exactly(name, start, sealed_length(data_length) - start))
        return await self._open_tail(name, data_length, start, tail)

    async def _open_tail(self, name: str, data_length: int, start: int, tail: memoryview) -> memoryview:
        footer = parse_footer(name, data_length, tail[data_length - start :])
        data = tail[: data_length - start]
        await self._check(name, footer, start // CHUNK_BYTES, data)
        if start:
            self._remember(name, footer)
        return data

    async def _fetch_footer(self, name: str, data_length: int) -> Footer:
        found = await self._read_exactly(name, data_length, footer_length(data_length))
        footer = parse_footer(name, data_length, found)
        self._remember(name, footer)
        return footer

    async def _read_exactly(self, name: str, offset: int, length: int) -> bytes:
        try:
            return await self._inner.read(name, offset, length)
        except RangeUnavailable as exc:
            raise _too_short(name) from exc

    async def _check(self, name: str, footer: Footer, first: int, data: memoryview) -> None:
        try:
            await self._compute(partial(check_chunks, name, footer, first, data), len(data))
        except CorruptBlob:
            self._footers.pop(name, None)
            raise

    async def _compute(self, call: Callable[[], T], size_bytes: int) -> T:
        if size_bytes < IN_THREAD_BYTES:
            return call()
        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    def _remembered(self, name: str, data_length: int) -> Footer | None:
        footer = self._footers.get(name)
        if footer is None or footer.data_length != data_length:
            return None
        self._footers.move_to_end(name)
        return footer

    def _remember(self, name: str, footer: Footer) -> None:
        self._footers[name] = footer
        self._footers.move_to_end(name)
        while len(self._footers) > self._footers_max:
            self._footers.popitem(last=False)


def _seal(name: str, data: Buffer) -> bytes:
    return b"".join((data, make_footer(name, data)))


def _unseal(name: str, data_length: int, then: Callable[[memoryview, Footer], T], sealed: Buffer) -> T:
    """Check a sealed object and hand on what is in it."""
    view = memoryview(sealed).toreadonly().cast("B")
    footer = parse_footer(name, data_length, view[data_length:])
    check_chunks(name, footer, 0, view[:data_length])
    return then(view[:data_length], footer)


def _too_short(name: str) -> CorruptBlob:
    return CorruptBlob(f"{name!r}: the object is shorter than its block")
