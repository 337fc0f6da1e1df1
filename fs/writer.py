"""Writer: from dirty bytes to a committed body. PUT first, commit second.

One commit stores its dirty ranges one behind the other as one blob, whose blocks are uploaded in parallel, and then
lays extents of it over the file in one transaction. So a file written in one go is one extent, and a thousand scattered
pages are one upload; what is small shares a blob with what others commit at the time (`packing.py`). What is uploaded
and then not committed is garbage under the session's number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from apollofs.fs.blobs import BlobSource, Block, block_count, block_of
from apollofs.fs.cache import BlockCache
from apollofs.fs.commit_copies import CommitCopies, Copied
from apollofs.fs.early_blocks import EarlyBlocks
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.packing import Packer
from apollofs.fs.plan import Dirty, Part, Place, Plan, make_plan
from apollofs.fs.reader import Reader
from apollofs.fs.segments import Segment
from apollofs.fs.upload_limit import UploadLimit
from apollofs.fs.workers import share_out
from apollofs.metadata.errors import BodyConflict, TooManyExtents
from apollofs.metadata.fates import Fate
from apollofs.metadata.records import Body, BodyChange, Inode, SetAttr, Superblock
from apollofs.metadata.session import Session

CONFLICTS_MAX = 64
"""A file that other mounts change faster than this many attempts can follow."""


class BodyVolume(Protocol):
    """What open files ask of `metadata.volume.Volume`."""

    superblock: Superblock

    @property
    def session(self) -> Session: ...
    def new_blob(self) -> int: ...
    def place_of(self, ino: int) -> tuple[int, bytes] | None: ...
    async def read_body(self, ino: int) -> Body: ...
    async def setattr(self, ino: int, change: SetAttr) -> Inode: ...
    async def commit_body(self, ino: int, change: BodyChange, session: Session | None = None) -> Inode: ...
    async def out_of_doubt(self) -> None: ...
    def fate_of(self, ino: int) -> Fate | None: ...


class CommitSource(Protocol):
    """An open file, as the writer sees it during one commit."""

    ino: int

    def base(self) -> Body:
        """The newest body known, with the pending holes cut."""
        ...

    def dirty(self) -> Dirty:
        """What this commit takes along: always the same bytes, moved along if a rebase moved what was appended."""
        ...

    async def read_staged(self, segment: Segment) -> bytes: ...

    def rebase(self, body: Body) -> None:
        """Another mount has changed the body: this is the newest."""
        ...

    def transacting(self, change: BodyChange) -> AbstractContextManager[None]:
        """Held from before the transaction is sent until its outcome is known; notes it if that stays unknown."""
        ...


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit has done. `body` is the file as it then was."""

    body: Body
    change: BodyChange

    @property
    def distance(self) -> int:
        """How far what was appended had to move, because the file had grown elsewhere."""
        if self.change.append_from is None:
            return 0
        return self.body.inode.size_bytes - self.change.size_at_least


@dataclass(frozen=True, slots=True)
class _Stored:
    """A plan's content, uploaded (`place` None: there was nothing to upload), or in memory if it goes inline."""

    content: tuple[tuple[int, int, int], ...]
    inline: bool
    place: Place | None
    data: bytes
    copies: Copied = ()
    """Where the upload is besides its own site, as the file's policy asks for."""

    def serves(self, plan: Plan) -> bool:
        return self.inline == plan.inline and self.content == plan.content


class Writer:
    """Uploads and commits for all open files of a mount; `uploads` says how many blocks may be in memory for it."""

    def __init__(
        self,
        volume: BodyVolume,
        source: BlobSource,
        cache: BlockCache,
        reader: Reader,
        uploads: UploadLimit,
        nursery: trio.Nursery,
        copies: CommitCopies,
    ) -> None:
        """`nursery` must outlive every commit."""
        self._copies = copies
        self._volume = volume
        self._source = source
        self._cache = cache
        self._reader = reader
        self._uploads = uploads
        self.packer = Packer(source, cache, volume.new_blob, nursery)

    async def commit(self, source: CommitSource, early: EarlyBlocks | None = None) -> Committed:
        """Store and commit what `source.dirty()` says. Several transactions only where other mounts interfere. What
        `early`, which is held still, has stored is not stored again.

        Raises BodyUnavailable, BlobStoreFull, and what `Volume.commit_body` raises but BodyConflict and
        TooManyExtents; then nothing was committed, unless the outcome of the transaction is unknown (`transacting`
        has noted that). Cancelled, likewise.
        """
        session = self._volume.session
        stored: _Stored | None = None
        rewrite = False
        with contextlib.ExitStack() as places:
            for _ in range(CONFLICTS_MAX):
                plan, stored = await self._prepare(source, early, stored, places, rewrite=rewrite)
                change = plan.inline_change(stored.data) if plan.inline else plan.blob_change(stored.place)
                if stored.copies:
                    change = replace(change, copies=stored.copies)
                try:
                    with source.transacting(change):
                        inode = await self._volume.commit_body(source.ino, change, session)
                except BodyConflict:
                    source.rebase(await self._volume.read_body(source.ino))
                except TooManyExtents:
                    rewrite = True
                    source.rebase(await self._volume.read_body(source.ino))
                else:
                    return Committed(Body(inode, change.inline or b""), change)
        raise BodyUnavailable(f"inode {source.ino:#x} was changed by other mounts at each of {CONFLICTS_MAX} attempts")

    async def _prepare(
        self,
        source: CommitSource,
        early: EarlyBlocks | None,
        stored: _Stored | None,
        places: contextlib.ExitStack,
        *,
        rewrite: bool,
    ) -> tuple[Plan, _Stored]:
        """A plan over the newest base, and its content stored; `places` lets go of it at the end. Returns without a
        checkpoint after the plan is made: a rebase during the upload moves what was appended, and the plan must know.
        """
        while True:
            plan = self._plan(source, rewrite=rewrite)
            if early is not None and not rewrite:
                plan = plan.with_early(early.find)
            if stored is not None and stored.serves(plan):
                return plan, stored
            if plan.inline:
                data = await self._bytes_of(source, plan, 0, plan.length)
                stored = _Stored(plan.content, True, None, data)
            elif 0 < plan.length <= self.packer.member_bytes_max and not plan.has_early:
                place = await self.packer.put(partial(self._bytes_of, source, plan, 0, plan.length))
                places.callback(self.packer.release, place)
                stored = _Stored(plan.content, False, place, b"", await self._copied(plan, place))
            else:
                uploaded = await self._upload(source, plan, early)
                stored = _Stored(plan.content, False, uploaded, b"", await self._copied(plan, uploaded))

    async def _copied(self, plan: Plan, place: Place | None) -> Copied:
        """See that the file's other sites have the upload too, if its policy makes a commit wait for that."""
        return await self._copies.settle(plan.base.inode.policy, plan.blob_change(place).extents)

    def _plan(self, source: CommitSource, *, rewrite: bool) -> Plan:
        return make_plan(source.base(), source.dirty(), self._volume.superblock.inline_bytes_max, rewrite=rewrite)

    # -- uploading ---------------------------------------------------------------------------------------------------

    async def _upload(self, source: CommitSource, plan: Plan, early: EarlyBlocks | None) -> Place | None:
        """The plan's parts as a new blob, or behind what was stored early; None if there are none."""
        length, block_bytes = plan.length, self._source.block_bytes
        place = early.room_for_rest(length) if early is not None and plan.has_early else None
        if not length:
            return None
        if place is None:
            place = Place(self._volume.new_blob(), 0, length)
            self._copies.begin(plan.base.inode.policy, place.blob)
        first = place.offset // block_bytes
        count = block_count(length, block_bytes)
        jobs = (
            (block_of(place.blob, place.blob_length, first + index, block_bytes), index * block_bytes)
            for index in range(count)
        )
        await share_out(partial(self._upload_block, source, plan), jobs, min(count, self._uploads.at_most))
        return place

    async def _upload_block(self, source: CommitSource, plan: Plan, job: tuple[Block, int]) -> None:
        """A block, and where it begins in what the plan stores."""
        block, start = job
        async with self._uploads.place(block.length):
            data = await self._bytes_of(source, plan, start, block.length)
            await self._source.put_block(block, data)
            await self._cache.insert(block, data)

    async def keep(self, block: Block, data: memoryview) -> None:
        """A block was put that nobody refers to yet, so nobody reads it either until this has returned."""
        await self._cache.insert(block, data)

    async def _bytes_of(self, source: CommitSource, plan: Plan, start: int, length: int) -> bytes:
        """Bytes `[start, start + length)` of the plan's parts, laid one behind the other."""
        found = []
        for part in _within(plan.unstored, start, length):
            if part.segment is not None:
                found.append(await source.read_staged(part.segment))
            else:
                data = await self._reader.pread(plan.base, part.offset, part.length)
                found.append(bytes(data).ljust(part.length, b"\0"))
        return found[0] if len(found) == 1 else b"".join(found)


def _within(parts: tuple[Part, ...], start: int, length: int) -> Iterator[Part]:
    """The parts, cut to `[start, start + length)` of their concatenation."""
    position = 0
    for part in parts:
        low = max(start - position, 0)
        high = min(start + length - position, part.length)
        if low < high:
            segment = part.segment
            if segment is not None:
                segment = segment.cut(segment.offset + low, segment.offset + high)
            yield Part(part.offset + low, high - low, segment)
        position += part.length
        if position >= start + length:
            return
