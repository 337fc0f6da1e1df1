"""What of a file that is written through the daemon is in the store before it is committed.

Whole blocks of what is staged are stored while the file grows, as are those of a working copy (`stored_blocks.py`): so
a commit finds nearly everything there. Rules:
1. What was stored is known by its place in the staging file, wherever in the file those bytes belong by the time of the
   commit. It counts for as long as nothing else is written to that place; while it is read the place is pinned.
2. A block is stored when it looks finished: whole, and staged where it was at the last call. Written anew, its bytes
   are staged elsewhere, and are stored anew.
3. During a commit nothing is stored early: what the commit takes along is stored once.
4. A blob is added to only until a commit refers to it; that puts the rest of what it stores into the same one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from apollofs.fs.growing_blob import BlockPlace, GrowingBlob
from apollofs.fs.plan import Place
from apollofs.fs.segments import Segment, SegmentMap
from apollofs.fs.staging import StagingFile
from apollofs.fs.stored_blocks import BlockUploads, Keep, Stretch
from apollofs.metadata.records import BodyChange

_BLOB_SHIFT = 48
"""Places in all blobs as one line: the blob's number, then the offset in it."""

Pieces = tuple[Segment, ...]


class EarlyBlocks:
    """Those of one open file. `keep` takes a block that was put into the cache."""

    def __init__(self, uploads: BlockUploads, staged: StagingFile, new_blob: Callable[[], int], keep: Keep) -> None:
        self._uploads = uploads
        self._staged = staged
        self._new_blob = new_blob
        self._keep = keep
        self._block_bytes = uploads.block_bytes
        self._stored = SegmentMap()
        """Places in the staging file, each with its place on the line of all blobs."""
        self._blobs: dict[int, GrowingBlob] = {}
        """Those in which it is, by number."""
        self._open: GrowingBlob | None = None
        """The one that takes more."""
        self._losses = 0
        self._seen: set[Pieces] = set()
        self._busy: set[Pieces] = set()
        self._under_way = 0
        self._all_done = trio.Event()
        self._held = False
        staged.on_change = self._changed

    # -- storing -----------------------------------------------------------------------------------------------------

    def ready(self) -> list[Callable[[], Awaitable[bool]]]:
        """Uploads of blocks that look finished, in the order of the file; to be started at once. They raise as
        `BlockUploads.store` does, and then the commit stores the block."""
        if self._held:
            return []
        found = (pieces for pieces in self._whole_blocks() if pieces not in self._busy)
        whole = [pieces for pieces in found if not all(map(self._is_stored, pieces))]
        quiet = [pieces for pieces in whole if pieces in self._seen][: max(0, self._uploads.workers - len(self._busy))]
        self._seen = set(whole)
        self._busy.update(quiet)
        return [partial(self._store, pieces, self._reserve()) for pieces in quiet]

    def _whole_blocks(self) -> Iterator[Pieces]:
        """What is staged of each block that is staged as a whole."""
        step, pieces, start = self._block_bytes, [], -1
        for segment in self._staged.map.segments():
            for low in range(segment.offset // step * step, segment.end, step):
                piece = segment.cut(max(low, segment.offset), min(low + step, segment.end))
                if piece.offset == low:
                    start, pieces = low, [piece]
                elif start == low and piece.offset == pieces[-1].end:
                    pieces.append(piece)
                else:
                    continue
                if piece.end == low + step:
                    yield tuple(pieces)

    def _is_stored(self, piece: Segment) -> bool:
        return sum(found.length for found in self._stored.within(piece.at, piece.length)) == piece.length

    def _reserve(self) -> BlockPlace:
        if self._open is None:
            self._open = GrowingBlob(self._new_blob(), self._block_bytes)
        return self._open.add(self._block_bytes)

    async def _store(self, pieces: Pieces, place: BlockPlace) -> bool:
        """Whether it was stored: not if the place that was kept for it came too late."""
        try:
            if self._held or self._staged.closed or not all(map(self._is_staged, pieces)):
                return False
            self._under_way += 1
            try:
                with self._staged.pinned():
                    await self._put([(piece.at, piece.length) for piece in pieces], place)
            finally:
                self._under_way -= 1
                if not self._under_way:
                    self._all_done.set()
                    self._all_done = trio.Event()
            return True
        finally:
            self._busy.discard(pieces)

    def _is_staged(self, piece: Segment) -> bool:
        """Whether it is still part of the file, and so still what it was."""
        return self._staged.map.within(piece.offset, piece.length) == [piece]

    async def _put(self, stretches: list[Stretch], place: BlockPlace) -> None:
        losses, fd = self._losses, self._staged.duplicate()
        try:
            await self._uploads.store(fd, stretches, None, lambda: place.block, self._keep)
        finally:
            os.close(fd)
        if losses != self._losses:
            return
        self._blobs[place.blob.number] = place.blob
        at = (place.blob.number << _BLOB_SHIFT) + place.offset
        for start, length in stretches:
            self._stored.put(Segment(start, length, at))
            at += length

    def _changed(self, at: int, length: int) -> None:
        """Told by the staging file: the bytes there are about to be others, or none."""
        self._stored.drop(at, at + length)
        if not self._stored:
            self._blobs.clear()

    def session_lost(self) -> None:
        """What was stored is garbage from now on; blobs of the session are not used again."""
        self._losses += 1
        self._stored.clear()
        self._blobs.clear()
        self._open = None

    def forget_blobs(self, change: BodyChange) -> None:
        """The blobs of a change may be garbage: what they have is stored anew."""
        for number in {extent.blob for extent in change.extents} & self._blobs.keys():
            del self._blobs[number]
            for segment in list(self._stored.segments()):
                if segment.at >> _BLOB_SHIFT == number:
                    self._stored.drop(segment.offset, segment.end)
            if self._open is not None and self._open.number == number:
                self._open = None

    # -- for a commit ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def held_still(self) -> AsyncIterator[None]:
        """Until the end of the block nothing more is stored early; what is under way has come to its end at its
        begin."""
        self._held = True
        try:
            while self._under_way:
                await self._all_done.wait()
            yield
        finally:
            self._held = False

    def find(self, segment: Segment) -> Iterator[tuple[Segment, GrowingBlob, int]]:
        """The parts of a staged segment that are in the store, each with its blob and its offset there."""
        for found in self._stored.within(segment.at, segment.length):
            start = segment.offset + found.offset - segment.at
            blob = self._blobs[found.at >> _BLOB_SHIFT]
            yield segment.cut(start, start + found.length), blob, found.at & (1 << _BLOB_SHIFT) - 1

    def room_for_rest(self, length: int) -> Place | None:
        """Where a commit is to put the `length` bytes that are not stored: behind what is, in a blob to which nothing
        is added from now on. None: there is no such blob."""
        blob, self._open = self._open, None
        if blob is None:
            return None
        return Place(blob.number, blob.add_rest(length), blob.length)
