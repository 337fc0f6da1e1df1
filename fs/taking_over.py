"""Taking over into a working copy what other mounts have changed of the body, except where it was changed here."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.blobstore.footer import footer_of
from apollofs.fs.differences import differing, without
from apollofs.fs.errors import MissingBlob
from apollofs.fs.reader import Reader
from apollofs.fs.stored_blocks import StoredBlocks
from apollofs.fs.working_copy import WorkingCopy
from apollofs.metadata import extents
from apollofs.metadata.records import Body


@dataclass(frozen=True, slots=True)
class TakingOver:
    """From `base`, of which the copy was a version, to `newest`."""

    copy: WorkingCopy
    stored: StoredBlocks
    reader: Reader
    block_bytes: int
    base: Body
    newest: Body

    async def run(self, append_from: int | None) -> int | None:
        """Do it; where what was appended here (from `append_from` on, None: nothing) begins now.

        Raises what reading does, StagingFull, StagingFailed; doing it again is harmless.
        """
        size = self.newest.inode.size_bytes
        if append_from is not None and size > append_from:
            await self._move_appended(append_from, size - append_from)
            append_from = size
        grown_here = self.copy.size_bytes > self.base.inode.size_bytes
        if size > self.copy.size_bytes or not grown_here:
            self.stored.forget([(size, max(size, self.copy.size_bytes))])
            self.copy.resize(size)
        for start in range(0, size, self.block_bytes):
            if not self._is_same(start):
                await self._take_block(start)
        return append_from

    def _is_same(self, start: int) -> bool:
        """Whether both versions refer to the same bytes in the block at `start`."""
        base, newest = self.base, self.newest
        length = min(self.block_bytes, newest.inode.size_bytes - start)
        if base.inode.is_inline or newest.inode.is_inline or base.inode.size_bytes < start + length:
            return False
        return self._pieces(base, start, length) == self._pieces(newest, start, length)

    def _pieces(self, body: Body, start: int, length: int) -> list[extents.Piece]:
        return extents.pieces(body.inode.extents, start, length)

    async def _take_block(self, start: int) -> None:
        theirs = bytes(await self.reader.pread(self.newest, start, self.block_bytes))
        ours = await self.copy.read(start, self.block_bytes)
        try:
            before = bytes(await self.reader.pread(self.base, start, self.block_bytes))
        except MissingBlob:
            before = ours  # collected since: nothing tells what was changed here
        # Past the old end, what is more than the hole that a resize leaves was written here.
        changed = list(differing(before.ljust(len(ours), b"\0"), ours, start))
        for low, high in without(differing(before, theirs, start), changed):
            await self.copy.write(low, theirs[low - start : high - start])
        if changed or len(ours) > len(theirs):
            self.stored.forget([(start, start + self.block_bytes)])
        else:
            pieces = self._pieces(self.newest, start, len(theirs))
            found = tuple(piece.extent for piece in pieces if piece.extent is not None)
            self.stored.refer(start // self.block_bytes, footer_of(theirs), found)

    async def _move_appended(self, start: int, distance: int) -> None:
        """What was appended here goes behind what was appended elsewhere."""
        end = self.copy.size_bytes
        await self.copy.move(start, end, distance)
        # What lay there is not ours any more; what was appended elsewhere is written over it.
        self.copy.punch(start, min(distance, end - start))
        self.stored.forget([(start, end + distance)])
