"""One body's image, open: what of it is there, what is verified, and what is on its way.

Rules
1. A block is fetched once however many wait for it. The fetch runs in the mount's nursery: who is cancelled leaves the
   others their block. Who waits has the bytes as soon as they are verified, before they are on the disk.
2. Nothing is handed out unverified. What was fetched or hashed in this process' life is not hashed again; the rest is
   hashed, in chunks of 256 KiB, when it is first read, and what does not match is fetched again.
3. Scattered reads of what is not here are served by range at first; a block that is wanted again is worth having whole.
4. A disk that fails costs speed: the bytes then come from the store each time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from apollofs.blobstore.errors import CorruptBlob
from apollofs.blobstore.footer import CHUNK_BYTES, Footer, check_chunks
from apollofs.fs.fetching import Fetch
from apollofs.fs.images.files import ImageFile
from apollofs.fs.images.map_file import NO_TRUST
from apollofs.fs.images.recent import RecentBlocks
from apollofs.fs.local_io import read_at_once, read_fully
from apollofs.fs.workers import share_out
from apollofs.metadata.extents import Extents

log = logging.getLogger(__name__)
T = TypeVar("T")
Bytes: TypeAlias = bytes | bytearray

PARTIAL_READS_MAX = 2
"""So many scattered reads of a block are served by range; with the next one it is worth having whole."""
ENSURE_TASKS_MAX = 16
"""Blocks that one call has in memory at once, at most."""
_OPEN, _VERIFIED = 0, 1


class Fetching(Protocol):
    """What an image asks of its store."""

    def start_fetch(self, image: Image, index: int, fetch: Fetch) -> None:
        """Fetch a block in the background; `image.fetched` follows."""
        ...

    async def read_range(self, image: Image, offset: int, length: int) -> bytes: ...
    def has_idle_downloads(self) -> bool: ...
    @property
    def recent(self) -> RecentBlocks: ...
    async def in_thread(self, call: Callable[[], T]) -> T: ...
    def warn(self, what: str) -> None: ...


class Image:
    """Made by `ImageStore.open`. Raises BodyUnavailable, CorruptBody, MissingBlob where it says that it fetches."""

    def __init__(self, store: Fetching, key: str, file: ImageFile, extents: Extents) -> None:
        self.key = key
        self.extents = extents
        self.file = file
        self.size_bytes = file.map.header.size_bytes
        self.block_bytes = file.map.header.block_bytes
        self.is_detached = False
        self.inos: set[int] = set()
        """For the store: the inodes of which it was opened since it was last idle."""
        self.idle_since = NO_TRUST
        """For the store: the file as it was when the image was last released."""
        self._store = store
        self._fetches: dict[int, Fetch] = {}
        self._misses: dict[int, int] = {}
        self._chunk_bytes = min(CHUNK_BYTES, self.block_bytes)
        self._verified = bytearray(-(-self.size_bytes // self._chunk_bytes))

    @property
    def fd(self) -> int:
        """Open for reading and writing, until the image is released."""
        return self.file.fd

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def blocks(self) -> int:
        return self.file.map.blocks

    @property
    def is_complete(self) -> bool:
        """Whether every block is there. It may not have been verified since a crash: see `trusted`."""
        return self.file.map.is_full

    @property
    def is_busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self._fetches)

    @property
    def trusted(self) -> bool:
        """Whether the file is, by number, size and ctime, what it was when all of it had been verified in this boot."""
        try:
            return self.is_complete and self.file.map.header.trust == self.file.identity()
        except OSError:
            return False

    def has(self, offset: int, length: int) -> bool:
        """Whether all blocks of a range are there."""
        return all(self.file.map.has(index) for index in self._blocks(offset, min(length, self.size_bytes - offset)))

    def footer(self, index: int) -> Footer | None:
        """The checksums of a block, if it is there."""
        return self.file.map.footer(index)

    # -- reading -----------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int) -> Bytes | memoryview | None:
        """Bytes `[offset, offset + length)`, if all of them are here, verified or quickly so; waits for nothing."""
        index, start = divmod(offset, self.block_bytes)
        if start + length <= self.block_bytes:
            recent = self._store.recent.read(self, index, start, length)
            if recent is not None:
                return recent
        for index in self._blocks(offset, length):
            if not self.file.map.has(index):
                return None
        try:
            return self._verified_bytes(offset, length, read_at_once)
        except (CorruptBlob, OSError):
            return None  # `read` sees it again, and says so

    async def read(self, offset: int, length: int, *, whole: bool) -> Bytes | memoryview:
        """Bytes `[offset, offset + length)`, fetched if they are not here; `whole`: by whole blocks, at once."""
        parts: list[Bytes | memoryview] = []
        ranges = list(self._ranges(offset, length))
        if whole:
            for index, _, _ in ranges:
                if not self._is_at_hand(index):
                    self._fetch(index)
        for index, start, count in ranges:
            parts.append(await self._read_part(index, start, count, whole=whole))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_part(self, index: int, offset: int, length: int, *, whole: bool) -> Bytes | memoryview:
        fetch = self._fetches.get(index)
        start = offset - index * self.block_bytes
        recent = self._store.recent.read(self, index, start, length)
        if recent is not None:
            return recent
        if fetch is None and self._is_there(index):
            found = await self._read_here(index, offset, length)
            if found is not None:
                return found
        fetch = fetch or self._fetches.get(index)
        if fetch is None and not whole and not self._is_popular(index):
            return await self._store.read_range(self, offset, length)
        data = await (fetch or self._fetch(index)).result()
        return data[start : start + length]

    async def _read_here(self, index: int, offset: int, length: int) -> Bytes | None:
        """Verified bytes of a block that should be there; None if it is not."""
        try:
            return self._verified_bytes(offset, length, read_at_once) or await self._store.in_thread(
                partial(self._verified_bytes, offset, length, _read_all)
            )
        except CorruptBlob as exc:
            if self.is_detached:
                return None  # it was changed by its owner, and is no image any more
            log.warning("an image in the cache is damaged and is fetched again: %s", exc)
            await self._discard(index)
        except OSError as exc:
            self._store.warn(f"an image can't be read: {exc}")
        return None

    def _verified_bytes(self, offset: int, length: int, read: Callable[[int, int, int], Bytes | None]) -> Bytes | None:
        """Read, and verify what was not verified yet. None if `read` has nothing. Raises CorruptBlob, OSError."""
        first, stop = self._chunks(offset, length)
        if self._verified.find(_OPEN, first, stop) < 0:
            return read(self.fd, offset, length)
        start = first * self._chunk_bytes
        data = read(self.fd, start, min(stop * self._chunk_bytes, self.size_bytes) - start)
        if data is None:
            return None
        view = memoryview(data)
        for index, begin, count in self._ranges(start, len(data)):
            footer = self.file.map.footer(index)
            if footer is None:
                return None
            at = begin - start
            check_chunks(self.key, footer, begin % self.block_bytes // self._chunk_bytes, view[at : at + count])
        self._set_verified(first, stop)
        return data if len(data) == length else data[offset - start : offset - start + length]

    def _is_there(self, index: int) -> bool:
        try:
            return self.file.map.reread(index)
        except OSError as exc:
            self._store.warn(f"a map can't be read: {exc}")
            return False

    def _is_at_hand(self, index: int) -> bool:
        return index in self._fetches or self._is_there(index) or self._store.recent.get(self, index) is not None

    async def _discard(self, index: int) -> None:
        try:
            await self._store.in_thread(partial(self.file.map.drop, index))
        except OSError as exc:
            self._store.warn(f"a map can't be written: {exc}")

    def warm(self, offset: int, length: int) -> None:
        """Ask the system to have a part of what is here in memory soon. May wait for the disk: for threads."""
        os.posix_fadvise(self.fd, offset, min(length, self.size_bytes - offset), os.POSIX_FADV_WILLNEED)

    # -- fetching ----------------------------------------------------------------------------------------------------

    async def ensure(self, offset: int, length: int) -> None:
        """See that bytes `[offset, offset + length)` are in the file, verified, or raise why they can't be.

        Blocks are fetched side by side. Returns also where the disk doesn't take them: then `is_complete` stays False.
        """
        blocks = self._blocks(offset, min(length, self.size_bytes - offset))
        await share_out(self._ensure, blocks, min(len(blocks), ENSURE_TASKS_MAX))

    def prefetch(self, offset: int, length: int) -> None:
        """Begin to fetch what will probably be read, as far as downloads are idle. Waits for nothing."""
        for index in self._blocks(offset, min(length, self.size_bytes - offset)):
            if not self._store.has_idle_downloads():
                return
            if not self._is_at_hand(index):
                self._fetch(index)

    async def verify(self) -> bool:
        """Hash all that is here, however often it was; fetch what is damaged. Whether the file is `trusted` then.

        Raises what `ensure` does.
        """
        self._verified[:] = bytes(len(self._verified))
        await self.ensure(0, self.size_bytes)
        return self.trusted

    async def settle(self) -> None:
        """Wait until nothing is on its way."""
        while self._fetches:
            await next(iter(self._fetches.values())).ended.wait()

    async def _ensure(self, index: int) -> None:
        if index not in self._fetches and self._is_there(index) and await self._verify_block(index):
            self._note_complete()
            return
        fetch = self._fetches.get(index) or self._fetch(index)
        await fetch.result()
        await fetch.ended.wait()

    async def _verify_block(self, index: int) -> bool:
        start, length = index * self.block_bytes, self.file.map.length(index)
        if self._verified.find(_OPEN, *self._chunks(start, length)) < 0:
            return True
        return await self._read_here(index, start, length) is not None

    def _fetch(self, index: int) -> Fetch:
        fetch = self._fetches[index] = Fetch()
        self._store.start_fetch(self, index, fetch)
        return fetch

    def fetched(self, index: int, *, stored: bool) -> None:
        """For the store: a fetch has ended; `stored`: its block is in the file."""
        if stored:
            self._set_verified(*self._chunks(index * self.block_bytes, self.file.map.length(index)))
            self._note_complete()
        self._fetches.pop(index).end()

    def _note_complete(self) -> None:
        """When every block is there, say so in the map; and if all was verified here, that the file may be trusted."""
        map_ = self.file.map
        if not map_.is_full or self.is_detached:
            return
        try:
            trust = self.file.identity() if _OPEN not in self._verified else NO_TRUST
            if not map_.header.complete or (trust != NO_TRUST and map_.header.trust != trust):
                map_.set_state(complete=True, trust=trust)
        except OSError as exc:
            self._store.warn(f"a map can't be written: {exc}")

    def _is_popular(self, index: int) -> bool:
        self._misses[index] = self._misses.get(index, 0) + 1
        return self._misses[index] > PARTIAL_READS_MAX

    def _chunks(self, offset: int, length: int) -> tuple[int, int]:
        """Those that a range touches: the first, and the one behind the last."""
        return offset // self._chunk_bytes, -(-(offset + length) // self._chunk_bytes)

    def _set_verified(self, first: int, stop: int) -> None:
        self._verified[first:stop] = bytes([_VERIFIED]) * (stop - first)

    def _blocks(self, offset: int, length: int) -> range:
        if length <= 0:
            return range(0)
        return range(offset // self.block_bytes, (offset + length - 1) // self.block_bytes + 1)

    def _ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """A range, block by block: index, offset in the body, length."""
        end = offset + length
        while offset < end:
            index = offset // self.block_bytes
            stop = min(end, (index + 1) * self.block_bytes)
            yield index, offset, stop - offset
            offset = stop


def _read_all(fd: int, offset: int, length: int) -> Bytes | None:
    """Blocks. None where the file was cut."""
    data = read_fully(fd, offset, length)
    return data if len(data) == length else None
