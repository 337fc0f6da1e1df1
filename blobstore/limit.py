"""How much may be under way at once: calls, and the bytes that they hold in memory.

Order of locks: a place first, then bytes. Who holds bytes holds a place already, so it ends and gives both back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from .block_port import BlockStore
from .footer import Footer
from .port import BlobStat, Buffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Reads and writes have each their own, so that neither waits behind the other."""

    reads_max: int = 16
    read_bytes_max: int = 256 << 20
    writes_max: int = 8
    write_bytes_max: int = 128 << 20
    unknown_read_bytes: int = 16 << 20
    """What a read to an unknown end counts for."""

    def __post_init__(self) -> None:
        assert min(self.reads_max, self.read_bytes_max, self.writes_max, self.write_bytes_max) > 0
        assert self.unknown_read_bytes > 0


class LimitingStore(BlockStore):
    """See `block_port.BlockStore`. Calls beyond the limits wait, in order of arrival.

    A `list` isn't limited: its consumer runs between its pages, and would wait for itself when it deletes what it saw.
    """

    def __init__(self, inner: BlockStore, limits: Limits) -> None:
        self._inner = inner
        self._unknown_read_bytes = limits.unknown_read_bytes
        self._reads = _Gate(limits.reads_max, limits.read_bytes_max)
        self._writes = _Gate(limits.writes_max, limits.write_bytes_max)

    async def put(self, name: str, data: Buffer) -> None:
        async with self._writes.entered(len(data)):
            await self._inner.put(name, data)

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        async with self._writes.entered(len(sealed)):
            await self._inner.put_sealed(name, sealed)

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        async with self._reads.entered(self._unknown_read_bytes if length is None else length):
            return await self._inner.read(name, offset, length)

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        async with self._reads.entered(max(0, data_length - offset) if length is None else length):
            return await self._inner.read_block(name, data_length, offset, length)

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        async with self._reads.entered(data_length):
            return await self._inner.fetch_block(name, data_length, then)

    async def stat(self, name: str) -> BlobStat:
        async with self._reads.entered(0):
            return await self._inner.stat(name)

    async def delete(self, name: str) -> None:
        async with self._writes.entered(0):
            await self._inner.delete(name)

    def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        return self._inner.list(prefix, start_after)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Gate:
    """Places and bytes, each first come first served."""

    def __init__(self, places: int, bytes_max: int) -> None:
        self._places = trio.Semaphore(places)
        self._bytes_max = bytes_max
        self._bytes_free = bytes_max
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @asynccontextmanager
    async def entered(self, size_bytes: int) -> AsyncIterator[None]:
        # One larger than everything goes alone rather than never.
        size_bytes = min(size_bytes, self._bytes_max)
        async with self._places:
            await self._take(size_bytes)
            try:
                yield
            finally:
                self._give_back(size_bytes)

    async def _take(self, size_bytes: int) -> None:
        if not self._waiting and size_bytes <= self._bytes_free:
            self._bytes_free -= size_bytes
            return
        entry = (size_bytes, trio.Event())
        self._waiting.append(entry)
        try:
            await entry[1].wait()
        except trio.Cancelled:
            if entry[1].is_set():
                self._give_back(size_bytes)  # granted and cancelled in one tick
            else:
                self._waiting.remove(entry)
                self._give_back(0)  # who stood behind may fit now
            raise

    def _give_back(self, size_bytes: int) -> None:
        self._bytes_free += size_bytes
        while self._waiting and self._waiting[0][0] <= self._bytes_free:
            granted, event = self._waiting.popleft()
            self._bytes_free -= granted
            event.set()
