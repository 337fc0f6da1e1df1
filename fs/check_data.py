"""`apollofs check --data`: reads every block of a tree from its store and compares it with its checksums.

Nothing is changed, and mounts may be at work meanwhile: a block that can't be read counts only if the file still refers
to it afterwards. Memory: `BLOCKS_AT_ONCE` blocks, and the names of the directories that are still to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blobs import BlobSource, Block, block_count, block_of
from apollofs.fs.errors import BodyError, CorruptBody, MissingBlob
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.records import Inode
from apollofs.metadata.tree import Place, Tree

BLOCKS_AT_ONCE = 8
FILES_AT_ONCE = 4
MISSING, DAMAGED, UNREADABLE = "missing", "damaged", "can't be read"


@dataclass(frozen=True, slots=True)
class Flaw:
    """A block that is not what was written, or that could not be had."""

    path: bytes
    ino: int
    blob: int
    block: int
    """Index in the blob."""
    what: str
    """MISSING, DAMAGED or UNREADABLE."""
    detail: str


@dataclass(slots=True)
class DataTotals:
    """What has been verified so far."""

    files: int = 0
    blocks: int = 0
    bytes: int = 0
    flaws: int = 0


@dataclass(slots=True)
class DataCheck:
    """One check; `found` is told of each flaw as it is found."""

    tree: Tree
    source: BlobSource
    found: Callable[[Flaw], None]
    totals: DataTotals = field(default_factory=DataTotals)

    async def run(self, path: bytes) -> DataTotals:
        """Verify the file at a path, or all files below it. Raises NoSuchEntry, NotADirectory, StoreError."""
        top = await self.tree.place(path)
        files_in, files_out = trio.open_memory_channel[Place](FILES_AT_ONCE)
        blocks_in, blocks_out = trio.open_memory_channel[tuple[Place, Block]](BLOCKS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._walk, top, files_in)
            async with blocks_in:
                for _ in range(FILES_AT_ONCE):
                    nursery.start_soon(self._list_blocks, files_out.clone(), blocks_in.clone())
            async with blocks_out, files_out:
                for _ in range(BLOCKS_AT_ONCE):
                    nursery.start_soon(self._verify_each, blocks_out.clone())
        return self.totals

    async def _walk(self, top: Place, files: trio.MemorySendChannel[Place]) -> None:
        """Every file, depth first."""
        async with files:
            left = [top]
            while left:
                place = left.pop()
                if place.is_file:
                    await files.send(place)
                elif place.is_dir:
                    left += await self._send_files(place, files)

    async def _send_files(self, directory: Place, files: trio.MemorySendChannel[Place]) -> list[Place]:
        """The files of a directory go on; its subdirectories are returned."""
        below: list[Place] = []
        after, more = b"", True
        while more:
            page, more = await self.tree.page(directory, after)
            for place in page:
                after = place.name
                if place.is_file:
                    await files.send(place)
                elif place.is_dir:
                    below.append(place)
        return below[::-1]

    async def _list_blocks(
        self, files: trio.MemoryReceiveChannel[Place], blocks: trio.MemorySendChannel[tuple[Place, Block]]
    ) -> None:
        async with files, blocks:
            async for place in files:
                try:
                    inode = await self.tree.file(place)
                except StaleInode:
                    continue
                self.totals.files += 1
                for block in self._blocks_of(inode):
                    await blocks.send((place, block))

    def _blocks_of(self, inode: Inode) -> Iterator[Block]:
        """Each block that some byte of the file is in. An extent that leaves its blob ends there: `check` names it."""
        size, before = self.source.block_bytes, None
        for extent in inode.extents:
            end = min(extent.blob_offset + extent.length, extent.blob_length)
            for index in range(extent.blob_offset // size, block_count(end, size)):
                block = block_of(extent.blob, extent.blob_length, index, size)
                if block != before:
                    yield block
                before = block

    async def _verify_each(self, blocks: trio.MemoryReceiveChannel[tuple[Place, Block]]) -> None:
        async with blocks:
            async for place, block in blocks:
                await self._verify(place, block)

    async def _verify(self, place: Place, block: Block) -> None:
        try:
            data = await self.source.read_block(block)
        except (BodyError, BlobStoreError, UserError) as exc:
            if await self._still_refers(place, block):
                self.totals.flaws += 1
                self.found(Flaw(place.path, place.ino, block.blob, block.index, _what(exc), str(exc)))
            return
        self.totals.blocks += 1
        self.totals.bytes += len(data)

    async def _still_refers(self, place: Place, block: Block) -> bool:
        try:
            inode = await self.tree.file(place)
        except StaleInode:
            return False
        return block in self._blocks_of(inode)


def _what(exc: Exception) -> str:
    if isinstance(exc, MissingBlob):
        return MISSING
    return DAMAGED if isinstance(exc, CorruptBody) else UNREADABLE
