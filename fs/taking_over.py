"""Taking over into a working copy what other mounts have changed of the body, except where it was changed here."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from apollofs.blobstore.footer import footer_of
from apollofs.fs.differences import differing, joined, without
from apollofs.fs.errors import MissingBlob
from apollofs.fs.reader import Reader
from apollofs.fs.stored_blocks import StoredBlocks
from apollofs.fs.working_copy import WorkingCopy
from apollofs.metadata import extents
from apollofs.metadata.fates import Fate
from apollofs.metadata.records import Body, BodyChange, InodeFlag

SAME_BY_CHANCE = 16
"""Fewer bytes than these between others that were written here count as written here, though they are as before."""


@dataclass(slots=True)
class Taken:
    """How far a working copy has come; kept where taking over is interrupted, so that it goes on from there."""

    append_from: int | None = None
    """Where what was appended here begins; None: nothing was."""
    size_bytes: int | None = None
    """The size of the version that the copy was brought to; None: still that of the base."""
    blocks: dict[int, Body] = field(default_factory=dict)
    """By their start, blocks that are of a later version than the base."""
    kept_end: int = 0
    """Up to where there are bytes that were written here, past the end to which others have cut the file."""

    def done(self) -> None:
        """The copy is of the newest version now, which becomes the base."""
        self.size_bytes = None
        self.blocks.clear()
        self.kept_end = 0

    def committed(self, size: int, size_here: int) -> None:
        """The first `size` bytes of the copy are a version; what was appended since is not, if it is longer by now."""
        appended = self.append_from is not None and size_here > size
        self.append_from = max(size, self.append_from or 0) if appended else None

    def truncated(self, size: int) -> None:
        """The copy is to have so many bytes."""
        self.append_from = None
        self.kept_end = min(self.kept_end, size)
        if self.size_bytes is not None:
            self.size_bytes = size


def as_committed(change: BodyChange, base: Body, newest: Body, fate: Fate | None) -> Body | None:
    """The body as `change` of a working copy has made it from `base`, if it was applied: `fate` says so, or, if that is
    not known, `newest` shows it. (A change that others have wholly overwritten since looks as if it never was.)"""
    inode, version = newest.inode, base.inode.body_version + 1
    if inode.body_version < version:
        return None
    if not (_shows(change, base, newest) if fate is None else fate.applied):
        return None
    if inode.body_version == version:
        return newest
    flags = inode.flags & ~InodeFlag.INLINE if change.inline is None else inode.flags | InodeFlag.INLINE
    size, laid = change.size_at_least, change.extents
    return Body(inode._replace(body_version=version, size_bytes=size, extents=laid, flags=flags), change.inline or b"")


def _shows(change: BodyChange, base: Body, newest: Body) -> bool:
    inode = newest.inode
    if change.inline is not None:
        return bool(change.inline) and inode.is_inline and newest.inline.startswith(change.inline)
    new = {extent.blob for extent in change.extents} - {extent.blob for extent in base.inode.extents}
    return not new.isdisjoint(extent.blob for extent in inode.extents) or inode.extents == change.extents


@dataclass(frozen=True, slots=True)
class TakingOver:
    """From `base`, of which the copy was a version but for what is `taken`, to `newest`.

    What others have cut goes here too, but for bytes that were written here and are not committed: those count as
    written after the cut. `clean`: nothing was written here.
    """

    copy: WorkingCopy
    stored: StoredBlocks
    reader: Reader
    block_bytes: int
    base: Body
    newest: Body
    taken: Taken
    clean: bool

    async def run(self) -> None:
        """Do it; nothing else of the daemon may write to the copy meanwhile.

        Raises what reading does, StagingFull, StagingFailed; another run, to this or a later version, then goes on
        where this one was.
        """
        size, taken = self.newest.inode.size_bytes, self.taken
        if taken.append_from is not None and size > taken.append_from:
            await self._move_appended(taken.append_from, size - taken.append_from)
            taken.append_from = size
        before = self.base.inode.size_bytes if taken.size_bytes is None else taken.size_bytes
        grown_here = self.copy.size_bytes > before
        if size > self.copy.size_bytes or (self.clean and not grown_here):
            self._resize(size)
        known = max(before, size, *(body.inode.size_bytes for body in (self.base, *taken.blocks.values())))
        for start in await self._blocks(min(known, self.copy.size_bytes)):
            base = taken.blocks.get(start, self.base)
            if not self._is_same(base, start):
                await self._take_block(base, start)
                taken.blocks[start] = self.newest
        end = max(size, taken.kept_end)
        if not grown_here and self.copy.size_bytes > size:
            self._resize(end)
        elif taken.append_from is not None and taken.append_from > end:
            await self._close_up(taken.append_from, end)
            taken.append_from = end
        taken.done()

    async def _blocks(self, end: int) -> list[int]:
        """Where the blocks begin, up to `end`, in which any version has data; where all have holes nothing is to do."""
        bodies = (self.base, self.newest, *self.taken.blocks.values())
        data = [(extent.offset, extent.end) for body in bodies for extent in body.inode.extents]
        data += [(0, body.inode.size_bytes) for body in bodies if body.inode.is_inline]
        data += await self.copy.data_within(0, end)
        step = self.block_bytes
        found = {at for low, high in data for at in range(low // step * step, min(high, end), step)}
        return sorted(found)

    def _resize(self, size: int) -> None:
        self.stored.forget([(size, max(size, self.copy.size_bytes))])
        self.copy.resize(size)
        self.taken.size_bytes = size

    def _is_same(self, base: Body, start: int) -> bool:
        """Whether both versions refer to the same bytes in the block at `start`."""
        newest, end = self.newest, start + self.block_bytes
        if newest.inode.size_bytes < min(end, base.inode.size_bytes) and not self.clean:
            return False  # cut elsewhere, also where there was a hole: something may have been written there
        length = min(self.block_bytes, max(base.inode.size_bytes, newest.inode.size_bytes) - start)
        if base.inode.is_inline or newest.inode.is_inline or base.inode.size_bytes < start + length:
            return False
        return self._pieces(base, start, length) == self._pieces(newest, start, length)

    def _pieces(self, body: Body, start: int, length: int) -> list[extents.Piece]:
        return extents.pieces(body.inode.extents, start, length)

    async def _take_block(self, base: Body, start: int) -> None:
        theirs = bytes(await self.reader.pread(self.newest, start, self.block_bytes))
        try:
            before = bytes(await self.reader.pread(base, start, self.block_bytes))
        except MissingBlob:
            before = None  # collected since: nothing tells what was changed here
        # last: the kernel may write to the copy at any moment
        ours = await self.copy.read(start, self.block_bytes)
        if before is None:
            before = ours
        # Past the old end, what is more than the hole that a resize leaves was written here.
        changed = list(differing(before.ljust(len(ours), b"\0"), ours, start))
        for low, high in without(differing(before, theirs, start), changed):
            await self.copy.write(low, theirs[low - start : high - start])
        appended = self.taken.append_from
        cut = (start + len(theirs), start + len(ours) if appended is None else min(start + len(ours), appended))
        changed = joined(changed, SAME_BY_CHANCE)
        for low, high in without([cut], changed):
            self.copy.punch(low, high - low)
        kept = [min(high, cut[1]) for low, high in changed if high > cut[0] and low < cut[1]]
        self.taken.kept_end = max([self.taken.kept_end, *kept])
        if changed or len(ours) > len(theirs) or self.newest.inode.is_inline:
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

    async def _close_up(self, start: int, end: int) -> None:
        """Others have cut the file: what was appended here, from `start` on, follows its new end."""
        size = self.copy.size_bytes
        with trio.CancelScope(shield=True):  # a part of it would be there twice
            for at in range(start, size, self.block_bytes):
                await self.copy.write(end + at - start, await self.copy.read(at, min(self.block_bytes, size - at)))
        self.stored.forget([(end, size)])
        self._resize(end + size - start)
