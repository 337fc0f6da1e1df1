"""Blobs in a dict: the reference that the contract suite holds the real stores against, and a fake for fast tests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import trio

from .errors import NoSuchBlob, RangeUnavailable
from .names import check_name, check_prefix, check_range
from .port import BlobStat, BlobStore, Buffer


class MemoryStore(BlobStore):
    """See `port.BlobStore`. Nothing survives the object."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._blobs: dict[str, tuple[bytes, float]] = {}

    async def put(self, name: str, data: Buffer) -> None:
        check_name(name)
        await trio.lowlevel.checkpoint()
        self._blobs[name] = (bytes(data), self._clock())

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_name(name)
        check_range(offset, length)
        await trio.lowlevel.checkpoint()
        data, _ = self._entry(name)
        end = max(offset, len(data)) if length is None else offset + length
        if end > len(data):
            raise RangeUnavailable(f"{name!r} has {len(data)} bytes, not the range [{offset}, {end})")
        return data[offset:end]

    async def stat(self, name: str) -> BlobStat:
        check_name(name)
        await trio.lowlevel.checkpoint()
        data, modified_s = self._entry(name)
        return BlobStat(name, len(data), modified_s)

    async def delete(self, name: str) -> None:
        check_name(name)
        await trio.lowlevel.checkpoint()
        self._blobs.pop(name, None)

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        check_prefix(prefix)
        await trio.lowlevel.checkpoint()
        for name in sorted(self._blobs):
            if name > start_after and name.startswith(prefix) and name in self._blobs:
                data, modified_s = self._blobs[name]
                yield BlobStat(name, len(data), modified_s)
                await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _entry(self, name: str) -> tuple[bytes, float]:
        try:
            return self._blobs[name]
        except KeyError:
            raise NoSuchBlob(f"no blob is named {name!r}") from None
