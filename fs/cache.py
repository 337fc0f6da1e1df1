"""The block cache: every read of a block comes through here, from the local disk or from the store.

Rules
1. A block is fetched once however many readers wait for it. The fetch runs in the mount's nursery: a reader that is
   cancelled leaves the others their block.
2. A cache that can't be used (full, failing or read-only disk, deleted directory) costs speed, never an error.
3. Nothing is handed out unverified: neither from the store (`BlobSource`) nor from the disk (`cache_files`).
4. Memory: at most `downloads_max` blocks are held by fetches, until they are on disk.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from apollofs.blobstore.footer import Footer
from apollofs.fs.blobs import BlobSource, Block
from apollofs.fs.cache_files import CacheFileCorrupt, CacheFiles, CacheIndex
from apollofs.fs.config import BodyConfig
from apollofs.fs.fetching import Fetch
from apollofs.fs.room import Room, Victim
from apollofs.fs.seldom import SeldomWarning

log = logging.getLogger(__name__)
T = TypeVar("T")

THREADS = 8
MISSES_REMEMBERED = 4096
PARTIAL_READS_MAX = 2
"""So many scattered reads of a block are served by range; with the next one it is worth having whole."""
FETCHES_MAX = 2
"""A block that was given up while it was written is fetched once more for who wants it here."""
EVICTIONS_MAX = 8
"""Rounds of making room on a full disk before a block is not cached."""


class BlockCache:
    """Made by `Bodies`; `nursery` must outlive every reader."""

    def __init__(
        self,
        source: BlobSource,
        room: Room,
        downloads: trio.CapacityLimiter,
        config: BodyConfig,
        scratch: str,
        nursery: trio.Nursery,
    ) -> None:
        """`scratch`: a directory of this mount alone, on the disk of `config.cache_dir`, for unfinished files."""
        self._source = source
        self._room = room
        self._files = CacheFiles(os.path.join(config.cache_dir, "blocks"), scratch, config.disk_free_bytes_min)
        self._index = CacheIndex(room, self._files)
        self._nursery = nursery
        self._fetches: dict[Block, Fetch] = {}
        self._fetches_max = config.downloads_max
        self._downloads = downloads
        self._threads = trio.CapacityLimiter(THREADS)
        self._token = trio.lowlevel.current_trio_token()
        self._misses: OrderedDict[Block, int] = OrderedDict()
        self._warn = SeldomWarning(log, "the block cache is not used where it should be: %s")
        self.hits = 0
        self.fetched = 0

    async def start(self) -> None:
        """Take stock of what an earlier mount left; blocks beyond the bound are deleted."""
        try:
            found = await self._in_thread(self._files.scan)
            for block in found:
                self._index.add(block)
            await self._in_thread(partial(self._room.remove, self._room.give_up()))
        except OSError as exc:
            self._warn(f"its directory can't be used: {exc}")

    @property
    def bytes_used(self) -> int:
        return self._index.bytes

    @property
    def blocks(self) -> int:
        return len(self._index)

    def __contains__(self, block: Block) -> bool:
        """Whether the block is probably on the disk."""
        return block in self._index

    async def read(self, block: Block, offset: int, length: int, *, whole: bool = True) -> memoryview:
        """Bytes `[offset, offset + length)` of a block.

        `whole`: if the block isn't here, fetch all of it; else only the range, at first. Raises BodyUnavailable,
        CorruptBody, MissingBlob. Cancelled, a fetch that has begun goes on and ends in the cache.
        """
        fetch = self._fetches.get(block)
        if fetch is None:
            found = await self._read_local(block, offset, length)
            if found is not None:
                self.hits += 1
                return found
            fetch = self._fetches.get(block)
        if fetch is None and not whole and length < block.length and not self._is_popular(block):
            async with self._downloads:
                return await self._source.read_block(block, offset, length)
        data = await (fetch or self._fetch(block)).result()
        return data[offset : offset + length]

    def prefetch(self, block: Block) -> None:
        """Begin to fetch a block that will probably be read, unless it is here or too much is under way."""
        if block in self._index or block in self._fetches or len(self._fetches) >= self._fetches_max:
            return
        self._fetch(block)

    async def fetch(self, block: Block, *, whole: bool = True) -> None:
        """Have a block here, or if not `whole`, once it was wanted several times. Raises as `read`."""
        if block in self._index and block not in self._fetches:
            return
        if block not in self._fetches and not whole and not self._is_popular(block):
            return
        for _ in range(FETCHES_MAX):
            fetch = self._fetches.get(block) or self._fetch(block)
            await fetch.result()
            await fetch.ended.wait()
            if block in self._index:
                return

    async def insert(self, block: Block, data: bytes | bytearray | memoryview) -> None:
        """Put a block that was just stored; `data` must not change until the call has returned. Raises nothing.

        Who reads it meanwhile has it from memory.
        """
        if block in self._fetches:
            return
        fetch = self._fetches[block] = Fetch()
        fetch.arrived(memoryview(data))
        try:
            await self._store(block, data)
        finally:
            del self._fetches[block]
            fetch.end()

    async def settle(self) -> None:
        """Wait until what is on its way now has come to rest."""
        for fetch in list(self._fetches.values()):
            await fetch.ended.wait()

    async def make_room(self, size: int) -> None:
        """Somebody needs the disk: give up so many bytes, if there are so many. Raises nothing."""
        await self._remove(self._room.give_up(self._room.bytes - size))

    async def _remove(self, victims: Sequence[Victim]) -> None:
        await self._room.clear_out(victims, self._threads, self._warn)

    # -- fetching ----------------------------------------------------------------------------------------------------

    def _is_popular(self, block: Block) -> bool:
        misses = self._misses.pop(block, 0) + 1
        if misses > PARTIAL_READS_MAX:
            return True
        self._misses[block] = misses
        if len(self._misses) > MISSES_REMEMBERED:
            self._misses.popitem(last=False)
        return False

    def _fetch(self, block: Block) -> Fetch:
        fetch = self._fetches[block] = Fetch()
        self._nursery.start_soon(self._run_fetch, block, fetch)
        return fetch

    async def _run_fetch(self, block: Block, fetch: Fetch) -> None:
        # An exception may not leave this task: the mount's nursery would end with it.
        try:
            async with self._downloads:
                data, lacking = await self._source.fetch_block(block, partial(self._take, block, fetch))
                fetch.arrived(data)
                self.fetched += 1
                if lacking:
                    await self._store(block, data)
                else:
                    self._index.add(block)
                    await self._remove(self._room.give_up())
        except Exception as exc:  # handed to every waiter
            if fetch.data is None:
                fetch.error = exc
            else:
                log.exception("a fetched block could not be cached")
        finally:
            del self._fetches[block]
            fetch.end()

    def _take(self, block: Block, fetch: Fetch, data: memoryview, footer: Footer) -> tuple[memoryview, int]:
        """In the thread that has received the block: tell who waits, then write. The block, and how many bytes the disk
        lacks for it."""
        fetch.tell(self._token, data)
        try:
            return data, self._files.write(block, data, footer)
        except OSError:
            return data, len(data)  # the next attempt says so

    # -- the local disk ----------------------------------------------------------------------------------------------

    async def _read_local(self, block: Block, offset: int, length: int) -> memoryview | None:
        read = partial(self._files.read, block, offset, length, self._index.footer(block))
        try:
            try:
                found = read(at_once=True)
            except BlockingIOError:
                found = await self._in_thread(partial(read, at_once=False))
        except CacheFileCorrupt as exc:
            log.warning("a file of the block cache is damaged and is fetched again: %s", exc)
            await self.discard(block)
            return None
        except OSError as exc:
            self._warn(f"a file can't be read: {exc}")
            return None
        if found is None:
            self._index.drop(block)
            return None
        self._index.add(block)
        self._index.remember(block, found.footer)
        return found.data

    async def discard(self, block: Block) -> None:
        """Delete a block's file. Raises nothing."""
        self._index.drop(block)
        try:
            await self._in_thread(partial(self._files.remove, [block]))
        except OSError as exc:
            self._warn(f"a damaged file can't be deleted: {exc}")

    async def _store(self, block: Block, data: bytes | bytearray | memoryview) -> None:
        self._index.add(block)
        victims = self._room.give_up()
        stored = False
        try:
            for _ in range(EVICTIONS_MAX):
                if block not in self._index:
                    break
                lacking, stayed = await self._in_thread(partial(self._write, block, data, victims))
                self._room.came_back(stayed)
                stored = lacking <= 0
                if stored and block not in self._index:
                    # it was given up while it was written, and its file perhaps deleted before it was there
                    await self._in_thread(partial(self._files.remove, [block]))
                if stored:
                    return
                victims = self._room.give_up(self._room.bytes - lacking)
            await self._in_thread(partial(self._room.remove, victims))
            self._warn("there is no room for a block")
        except OSError as exc:
            self._warn(f"a file can't be written: {exc}")
        finally:
            if stored and block in self._index:
                self._index.add(block)
            else:
                self._index.drop(block)

    def _write(
        self, block: Block, data: bytes | bytearray | memoryview, victims: Sequence[Victim]
    ) -> tuple[int, list[Victim]]:
        """In a thread: remove, then write. How many bytes the disk lacks, and who could not be removed."""
        stayed = self._room.remove(victims)
        return self._files.write(block, data), stayed

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._threads)
