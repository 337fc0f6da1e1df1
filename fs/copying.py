"""copy_file_range: what is in the store is shared by reference, and nothing moves; other bytes go through the mount.

Shared is a range of a committed body that is in blobs, wherever it begins and ends: extents count bytes. What the
source has not committed is committed first. Copied are inline bodies, and what lives on without a name; also if the
target's first bytes are inline and stay, and where other mounts change source or target at each attempt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from apollofs.fs.handles import FileHandle
from apollofs.fs.open_file import OpenFile
from apollofs.metadata import extents
from apollofs.metadata.errors import BodyConflict, TooManyExtents
from apollofs.metadata.records import Body, BodyChange, Extent

SHARE_CALL_BYTES_MAX = 2 << 30
"""What one call shares at most: its reply has 32 bits for it."""
BLOBS_MAX = 24
"""Blobs that one call shares: each takes two operations of the transaction."""
EXTENTS_MAX = 1024
COPY_CALL_BYTES_MAX = 128 << 20
"""What one call copies at most, so that it ends soon and can be interrupted; callers repeat it."""
COPY_CHUNK_BYTES = 1 << 20
ATTEMPTS = 8

Refresh = Callable[[OpenFile], Awaitable[None]]
"""Looks for a newer body of an open file; a handle's may be another object after that."""


async def copy_range(
    source: FileHandle, offset_in: int, target: FileHandle, offset_out: int, length: int, refresh: Refresh
) -> int:
    """Bytes `[offset_in, offset_in + length)`, which lie within the source, to `offset_out`: how many were, perhaps
    fewer. What was shared is committed on return. Raises what reading, writing and committing raise.
    """
    shared = await _share(source, offset_in, target, offset_out, min(length, SHARE_CALL_BYTES_MAX), refresh)
    if shared:
        return shared
    return await _copy(source, offset_in, target, offset_out, min(length, COPY_CALL_BYTES_MAX))


# -- sharing ----------------------------------------------------------------------------------------------------------


async def _share(
    source: FileHandle, offset_in: int, target: FileHandle, offset_out: int, length: int, refresh: Refresh
) -> int:
    """How many bytes are shared now; 0: they must be copied."""
    if source.file.is_dirty:
        await source.file.commit()
    if target.file.is_dirty:
        await target.file.commit(target.cursor)
    for _ in range(ATTEMPTS):
        if source.file.orphaned or target.file.orphaned:
            return 0
        plan = partial(shared_range, source.file.body, offset_in, offset_out, length)
        try:
            change = await target.file.share(plan)
        except TooManyExtents:
            return 0
        except BodyConflict:
            await refresh(source.file)
            await refresh(target.file)
        else:
            return change.size_at_least - offset_out if change is not None else 0
    return 0


def shared_range(source: Body, offset_in: int, offset_out: int, length: int, target: Body) -> BodyChange | None:
    """The change that makes the source's extents in a range the target's, up to `size_at_least`. None where bytes
    must be copied. Both bodies have all their extents."""
    length = min(length, source.inode.size_bytes - offset_in)
    if source.inode.is_inline or length <= 0:
        return None
    laid: list[Extent] = []
    blobs: set[int] = set()
    for piece in extents.pieces(source.inode.extents, offset_in, length):
        if piece.extent is None:
            continue
        blobs.add(piece.extent.blob)
        if len(blobs) > BLOBS_MAX or len(laid) == EXTENTS_MAX:
            length = piece.offset - offset_in
            break
        laid.append(replace(piece.extent, offset=piece.offset - offset_in + offset_out))
    inline = target.inode.is_inline
    if inline and (offset_out > 0 or length < len(target.inline)):
        return None
    return BodyChange(
        base_version=target.inode.body_version,
        size_at_least=offset_out + length,
        extents=tuple(laid),
        holes=((offset_out, length),),
        lifts_inline=inline,
        cloned_from=source.inode.ino,
    )


# -- copying ----------------------------------------------------------------------------------------------------------


async def _copy(source: FileHandle, offset_in: int, target: FileHandle, offset_out: int, length: int) -> int:
    """Through this mount. Holes stay holes past the target's end."""
    done = 0
    while done < length:
        data = bytes(await source.file.read(offset_in + done, min(COPY_CHUNK_BYTES, length - done), source.pattern))
        if not data:
            break
        if data.count(0) != len(data) or offset_out + done < target.file.size_bytes:
            await target.file.write(offset_out + done, data, target.cursor)
        done += len(data)
    if offset_out + done > target.file.size_bytes:
        await target.file.grow(offset_out + done, target.cursor)
    if target.is_synchronous:
        await target.file.commit(target.cursor)
    return done
