"""Storing a working copy block by block: each block is hashed, and put where its bytes are not in the store already.

Blocks that are new follow each other in one blob, in the order in which they are handed in, so that a file that was
written from front to end is one extent; blocks that were stored before and have been rewritten since go to a blob of
their own. A blob is added to only until a commit refers to it: from then on its length is known to others.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from apollofs.blobstore.footer import Footer, footer_of, pack_footer, sealed_length
from apollofs.fs.blobs import BlobSource, Block, block_count
from apollofs.fs.errors import BodyUnavailable, CopyCut
from apollofs.fs.growing_blob import BlockPlace, GrowingBlob
from apollofs.fs.upload_limit import UploadLimit
from apollofs.fs.workers import share_out
from apollofs.fs.working_copy import WorkingCopy, staging_error
from apollofs.metadata import extents
from apollofs.metadata.records import Extent

LOOK_AHEAD = 64
"""Blocks that are looked at in one poll."""

Stretch = tuple[int, int]
"""(offset, length) in a local file."""
Keep = Callable[[Block, memoryview], Awaitable[None]]
"""Is given a block that was put, before its memory is used again."""


class BlockUploads:
    """Those of one mount: as many blocks as `limit` lets be under way are in memory at once."""

    def __init__(self, source: BlobSource, limit: UploadLimit) -> None:
        self.block_bytes = source.block_bytes
        self.workers = limit.at_most
        self._source = source
        self._limit = limit
        self._threads = trio.CapacityLimiter(limit.at_most)
        self._rooms: list[mmap.mmap] = []
        """Free ones, at the start of a page: the cache's disk takes them as they are."""

    async def store(
        self,
        fd: int,
        stretches: Sequence[Stretch],
        known: Footer | None,
        place: Callable[[], Block],
        keep: Keep | None = None,
    ) -> tuple[Footer, Block | None]:
        """Put stretches of a file, one behind the other, as the block that `place` names, unless their checksums are
        `known`; those, and the block if it was put. Raises CopyCut, StagingFailed, and what `put_block` does."""
        length = sum(count for _, count in stretches)
        async with self._limit.place(length):
            room = self._rooms.pop() if self._rooms else self._new_room()
            try:
                view = memoryview(room)
                footer = await self._in_thread(partial(_load, fd, stretches, view[:length]))
                if footer == known:
                    return footer, None
                block = place()
                sealed = view[: sealed_length(length)]
                sealed[length:] = pack_footer(block.name, footer)
                await self._source.put_sealed(block, sealed)
                if keep is not None:
                    await keep(block, view[:length])
                return footer, block
            finally:
                self._rooms.append(room)

    def _new_room(self) -> mmap.mmap:
        try:
            return mmap.mmap(-1, sealed_length(self.block_bytes))
        except OSError as exc:
            raise BodyUnavailable(f"there is no memory for a block that is to be stored: {exc}") from exc

    async def _in_thread(self, call: Callable[[], Footer]) -> Footer:
        return await trio.to_thread.run_sync(call, limiter=self._threads)


def _load(fd: int, stretches: Sequence[Stretch], room: memoryview) -> Footer:
    """Fill `room` and hash it. Blocks; releases the GIL for nearly all of it."""
    done = 0
    try:
        for offset, length in stretches:
            start = done
            while done - start < length:
                count = os.preadv(fd, [room[done : start + length]], offset + done - start)
                if not count:
                    raise CopyCut("the file became shorter while it was read")
                done += count
    except OSError as exc:
        raise staging_error(exc) from exc
    return footer_of(room)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A block of the copy as it was when its bytes were last put, or as others have put it."""

    footer: Footer
    place: BlockPlace | None
    others: extents.Extents = ()
    """Where it is if there is no place; nothing: a hole."""

    def where(self, offset: int) -> extents.Extents:
        """Of the block at `offset` of the file; `blob_length` is final only when the blob is finished."""
        if self.place is None:
            return self.others
        blob, length = self.place.blob, self.footer.data_length
        return (Extent(offset, length, blob.number, self.place.offset, blob.length),)

    @property
    def is_in_closed_blob(self) -> bool:
        return self.place is not None and self.place.blob.closed

    def is_in(self, blobs: Collection[int]) -> bool:
        return any(extent.blob in blobs for extent in self.where(0))

    def is_only_in(self, blobs: Collection[int]) -> bool:
        return all(extent.blob in blobs for extent in self.where(0))


class StoredBlocks:
    """What is in the store of one working copy, by block; and what a commit is to refer to."""

    def __init__(self, uploads: BlockUploads, new_blob: Callable[[], int]) -> None:
        self._uploads = uploads
        self._new_blob = new_blob
        self._block_bytes = uploads.block_bytes
        self._table: dict[int, _Stored] = {}
        self._busy: dict[int, trio.Event] = {}
        self._blob: GrowingBlob | None = None
        self._ahead: GrowingBlob | None = None
        """As `_blob`, for what is stored ahead while a commit is under way, which does not refer to it."""
        self._commits = 0
        """How many blocks the commit that is under way is about."""
        self._generation = 0
        self._rewritten: GrowingBlob | None = None
        self._full_before: set[int] = set()

    # -- storing -----------------------------------------------------------------------------------------------------

    async def bring_up(self, copy: WorkingCopy, size: int) -> None:
        """Store whatever differs of the copy's first `size` bytes.

        Raises BodyUnavailable, BlobStoreFull, StagingFailed, CopyCut; what was stored then is not stored again.
        """
        self._commits = count = block_count(size, self._block_bytes)
        self._drop([index for index in self._table if index >= count])

        async def one(job: tuple[int, int, BlockPlace | None]) -> None:
            await self._store(copy, *job)

        data = await copy.data_within(0, size)
        holding = {index for low, end in data for index in range(low // self._block_bytes, self._behind(end))}
        await share_out(one, self._jobs(size, holding), min(count, self._uploads.workers))

    def _behind(self, end: int) -> int:
        """The first block that begins at or after `end`."""
        return -(-end // self._block_bytes)

    def _jobs(self, size: int, holding: set[int]) -> Iterator[tuple[int, int, BlockPlace | None]]:
        """What is not stored yet comes first: while it is on its way, the rest is compared. `holding`: the blocks that
        have any data; the others are holes."""
        for index in sorted(self._table.keys() - holding):
            self._drop([index])
        for index in sorted(holding, key=lambda index: (index in self._table, index)):
            length = min(self._block_bytes, size - index * self._block_bytes)
            yield index, length, self._reserve(index, length)

    async def ready(self, copy: WorkingCopy) -> list[Callable[[], Awaitable[bool]]]:
        """Uploads of blocks that look finished: whole, without holes, and so since the last call. To be started at
        once, in this order; they raise as `bring_up` does, and then the commit stores the block. Raises
        StagingFailed."""
        at = next(filter(self._is_open, range(copy.size_bytes // self._block_bytes)), None)
        if at is None:
            self._full_before = set()
            return []
        data = await copy.data_within(at * self._block_bytes, (at + LOOK_AHEAD) * self._block_bytes)
        whole = (range(self._behind(low), end // self._block_bytes) for low, end in data)
        full = {index for indices in whole for index in indices if self._is_open(index)}
        first = sorted(full & self._full_before)[: self._uploads.workers]
        self._full_before = full
        return [partial(self._store, copy, index, self._block_bytes, self._reserve_ahead(index)) for index in first]

    def _is_open(self, index: int) -> bool:
        """Whether a block is neither stored nor being stored."""
        return index not in self._table and index not in self._busy

    async def _store(self, copy: WorkingCopy, index: int, length: int, reserved: BlockPlace | None) -> bool:
        """Store one block if it differs from what is stored; whether it did, and was not too late for its blob."""
        while index in self._busy:
            await self._busy[index].wait()
        done = self._busy[index] = trio.Event()
        generation = self._generation
        try:
            stored = self._table.get(index)
            place = reserved if stored is None else None

            def where() -> Block:
                nonlocal place
                if place is None:
                    place, self._rewritten = self._next(self._rewritten, length)
                return place.block

            known = stored.footer if stored is not None else None
            footer, put = await self._uploads.store(copy.fd, [(index * self._block_bytes, length)], known, where)
            if put is None or place is None or place.blob.closed or generation != self._generation:
                return False
            self._table[index] = _Stored(footer, place)
            return True
        finally:
            del self._busy[index]
            done.set()

    # -- where blocks go ---------------------------------------------------------------------------------------------

    def _reserve(self, index: int, length: int) -> BlockPlace | None:
        """The next place of the blob for a block that is not stored yet; asked for in the order of the file."""
        stored = self._table.get(index)
        if stored is not None and stored.footer.data_length != length:
            self._drop([index])
        elif stored is not None or index in self._busy:
            return None
        place, self._blob = self._next(self._blob, length)
        return place

    def _reserve_ahead(self, index: int) -> BlockPlace | None:
        """As `_reserve`, for a whole block that is stored before anybody asks for it."""
        if index < self._commits or not self._commits:
            return self._reserve(index, self._block_bytes)
        place, self._ahead = self._next(self._ahead, self._block_bytes)
        return place

    def _next(self, blob: GrowingBlob | None, length: int) -> tuple[BlockPlace, GrowingBlob | None]:
        """A place in a blob, and the blob that is to be filled further: none after a short block."""
        blob = blob or GrowingBlob(self._new_blob(), self._block_bytes)
        place = blob.add(length)
        return place, blob if blob.takes_more else None

    # -- what a commit refers to -------------------------------------------------------------------------------------

    def finish_blobs(self, size: int) -> None:
        """A commit is about to refer to what `layout` says: nothing is added to these blobs from now on, nor does what
        is still on its way to them count. So a blob of which a commit refers to anything has nothing else, and is of no
        use once others have dropped that."""
        count = block_count(size, self._block_bytes)
        for index, stored in self._table.items():
            if index < count and stored.place is not None:
                stored.place.blob.closed = True
        self._drop([index for index, stored in self._table.items() if index >= count and stored.is_in_closed_blob])
        still_open = (blob for blob in (self._ahead, self._blob) if blob is not None and not blob.closed)
        self._blob, self._ahead = next(still_open, None), None
        if self._rewritten is not None and self._rewritten.closed:
            self._rewritten = None
        self.commit_ended()

    def commit_ended(self) -> None:
        """None is under way."""
        self._commits = 0

    def layout(self, size: int) -> extents.Extents:
        """Where the copy's first `size` bytes are, just after `bring_up`; holes where it has none."""
        count = block_count(size, self._block_bytes)
        return extents.merge(
            extent
            for index, stored in sorted(self._table.items())
            if index < count
            for extent in stored.where(index * self._block_bytes)
        )

    def footers(self, size: int) -> list[Footer] | None:
        """The checksums of all blocks of `size` bytes; None if some are holes."""
        count = block_count(size, self._block_bytes)
        if len(self._table) < count:
            return None
        found = [self._table[index].footer for index in range(count) if index in self._table]
        return found if len(found) == count else None

    def forget(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Ranges (offset, end) of the copy were changed by the daemon: their blocks are stored anew."""
        for start, end in ranges:
            gone = range(start // self._block_bytes, -(-end // self._block_bytes))
            self._drop([index for index in self._table if index in gone])

    def forget_blobs(self, blobs: Collection[int]) -> None:
        """Blobs that a commit referred to may be garbage: what they have is stored anew."""
        self._drop([index for index, stored in self._table.items() if stored.is_in(blobs)])

    def refer(self, index: int, footer: Footer, others: extents.Extents) -> None:
        """A block of the copy holds what others have stored, at `others`."""
        self._table[index] = _Stored(footer, None, others)

    def clear(self) -> None:
        """Store everything anew, in one blob."""
        self.keep_only(())

    def keep_only(self, blobs: Collection[int]) -> None:
        """Refer to nothing that was stored until now but what is in `blobs`, which are whole."""
        self._generation += 1
        self._blob = self._ahead = self._rewritten = None
        self._drop([index for index, stored in self._table.items() if not stored.is_only_in(blobs)])

    def _drop(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._table.pop(index, None)
