"""Copying a blob to another site's store: the same objects, under the same names.

A blob may lack blocks that nothing refers to, of an upload that failed and was repeated elsewhere. Those are passed
over.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

import trio

from apollofs.blobstore import Buffer
from apollofs.blobstore.footer import Footer
from apollofs.fs.blobs import BlobSource, Block, block_count, block_of
from apollofs.fs.errors import BodyUnavailable, MissingBlob
from apollofs.fs.workers import share_out
from apollofs.metadata.copies import Copies
from apollofs.metadata.records import Extent
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.session import Session

BLOCKS_AT_ONCE = 8
"""Of one blob."""
FINISH_ATTEMPTS = 16
"""How often others may note copies of the same blobs at the same time."""


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """What all copying of a process keeps to."""

    room: trio.CapacityLimiter
    """Blocks that are in memory at once."""
    turn: Callable[[int], Awaitable[None]]
    """Waits until so many bytes may be moved."""
    put_s: float = math.inf
    """How long putting a block may take."""


def blocks_of(blob: int, length: int, block_bytes: int) -> list[Block]:
    """All blocks that a blob of this length can have."""
    return [block_of(blob, length, index, block_bytes) for index in range(block_count(length, block_bytes))]


def referred_blocks(blob: int, extents: Iterable[Extent], block_bytes: int) -> set[int]:
    """The indices of a blob's blocks that extents refer to."""
    return {
        index
        for extent in extents
        if extent.blob == blob
        for index in range(
            extent.blob_offset // block_bytes, block_count(extent.blob_offset + extent.length, block_bytes)
        )
    }


async def copy_blob(
    source: BlobSource, blob: int, length: int, referred: set[int], site: int, limits: CopyLimits
) -> int:
    """Copy every block to `site`, from wherever it is nearest; how many bytes. Durable on return; repeating it is
    harmless. Raises MissingBlob for a block that is `referred` to, CorruptBody, BodyUnavailable, BlobStoreFull.
    """
    copied = 0

    async def one(block: Block) -> None:
        nonlocal copied
        async with limits.room:
            await limits.turn(block.length)
            try:
                sealed = await source.fetch_block(block, _sealed)
            except MissingBlob:
                if block.index in referred:
                    raise
                return
            try:
                with trio.fail_after(limits.put_s):
                    await source.put_sealed(block, sealed, site)
            except trio.TooSlowError as exc:
                raise BodyUnavailable(f"a block was not at site {site} within {limits.put_s:g} s") from exc
        copied += block.length

    blocks = blocks_of(blob, length, source.block_bytes)
    await share_out(one, iter(blocks), min(len(blocks), BLOCKS_AT_ONCE))
    return copied


async def remove_copy(source: BlobSource, blob: int, length: int, site: int) -> None:
    """Take away what was copied of a blob that has been collected meanwhile. Raises what `delete_block` does."""
    for block in blocks_of(blob, length, source.block_bytes):
        await source.delete_block(block, site)


async def note_copies(
    replicas: Replicas, session: Session, site: int, copied: dict[int, Copies], remove: Callable[[int], Awaitable[None]]
) -> Collection[int]:
    """Note that `site` has these blobs now; of one that was collected meanwhile, `remove` the copy. Those that could
    not be noted, because others keep noting theirs. Raises what `Replicas` and `remove` do."""
    for _ in range(FINISH_ATTEMPTS):
        done = await replicas.finish(session, site, copied)
        left = copied.keys() - done.keys()
        if not left:
            return ()
        copied = await replicas.read(left)
        for blob in [blob for blob, copies in copied.items() if site not in copies.sites]:
            del copied[blob]
            await remove(blob)
    return copied


def _sealed(data: memoryview, _: Footer) -> Buffer:
    """The object as it was received, its checksums included: nothing is copied, nor computed once more."""
    return memoryview(data.obj).cast("B").toreadonly()
