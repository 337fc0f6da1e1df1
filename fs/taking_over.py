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
from apollofs.metadata.records import FILE_BYTES_MAX, Body, BodyChange, InodeFlag

SAME_BY_CHANCE = 16
"""Fewer bytes than these between others that were written here count as written here, though they are as before."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Of which version a block of the copy is, but for what was written here."""

    body: Body
    cut_to: int
    """So many bytes of the whole version are in the copy; behind them it was cut."""


@dataclass(slots=True)
class Taken:
    """How far a working copy has come; kept where taking over is interrupted, so that it goes on from there."""

    append_from: int | None = None
    """Where what was appended here begins; None: nothing was."""
    size_bytes: int | None = None
    """The size of the version that the copy was brought to; None: still that of the base."""
    blocks: dict[int, Standing] = field(default_factory=dict)
    """By their start, blocks that are of a later version than the base."""
    cut_to: int = FILE_BYTES_MAX
    """So many bytes of the base are in the copy still: it was cut since."""
    kept_end: int = 0
    """Up to where there are bytes that were written here, past the end to which others have cut the file."""

    def done(self) -> None:
        """The copy is of the newest version now, which becomes the base."""
        self.size_bytes = None
        self.blocks.clear()
        self.kept_end, self.cut_to = 0, FILE_BYTES_MAX

    def committed(self, size: int, size_here: int) -> None:
        """The first `size` bytes of the copy are a version; what was appended since is not, if it is longer by now."""
        self.cut_to = FILE_BYTES_MAX
        appended = self.append_from is not None and size_here > size
        self.append_from = max(size, self.append_from or 0) if appended else None

    def truncated(self, size: int) -> None:
        """The copy is to have so many bytes."""
        self.append_from = None
        self.cut(size)
        self.kept_end = min(self.kept_end, size)
        if self.size_bytes is not None:
            self.size_bytes = size

    def cut(self, size: int) -> None:
        """Of what the copy was it has no more than so many bytes now."""
        self.cut_to = min(self.cut_to, size)
        self.blocks = {start: Standing(each.body, min(each.cut_to, size)) for start, each in self.blocks.items()}


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
        if taken.append_from is not None and taken.append_from >= self.copy.size_bytes:
            taken.append_from = None
        if taken.append_from is not None and size > taken.append_from:
            await self._move_appended(taken.append_from, size - taken.append_from)
            taken.append_from = size
        before = self.base.inode.size_bytes if taken.size_bytes is None else taken.size_bytes
        grown_here = self.copy.size_bytes > before
        if size > self.copy.size_bytes or (self.clean and not grown_here):
            self._resize(size)
        size_here = self.copy.size_bytes
        versions = (self.base, *(each.body for each in taken.blocks.values()))
        known = max(before, size, *(body.inode.size_bytes for body in versions))
        for start in await self._blocks(min(known, size_here)):
            standing = taken.blocks.get(start, Standing(self.base, taken.cut_to))
            if not self._is_same(standing, start):
                await self._take_block(standing, start)
                taken.blocks[start] = Standing(self.newest, FILE_BYTES_MAX)
        if taken.append_from is not None and taken.append_from > max(size, taken.kept_end):
            await self._close_up(taken.append_from, max(size, taken.kept_end))
        elif not grown_here and size_here > size:
            end = max(size, taken.kept_end, await self._last_written(size))
            if self.copy.size_bytes == size_here:  # otherwise it has grown since
                self._resize(end)
        taken.done()

    async def _blocks(self, end: int) -> list[int]:
        """Where the blocks begin, up to `end`, in which any version has data; where all have holes nothing is to do."""
        bodies = (self.base, self.newest, *(each.body for each in self.taken.blocks.values()))
        data = [(extent.offset, extent.end) for body in bodies for extent in body.inode.extents]
        data += [(0, body.inode.size_bytes) for body in bodies if body.inode.is_inline]
        data += await self.copy.data_within(0, end)
        step = self.block_bytes
        found = {at for low, high in data for at in range(low // step * step, min(high, end), step)}
        return sorted(found)

    async def _last_written(self, start: int) -> int:
        """The end of the last byte from `start` on that is no zero: what was cut is zeros by now, so it was written
        here. Found from the back, so that there is little time for more."""
        for low, high in reversed(await self.copy.data_within(start, self.copy.size_bytes)):
            for at in reversed(range(low, high, self.block_bytes)):
                found = len((await self.copy.read(at, min(self.block_bytes, high - at))).rstrip(b"\0"))
                if found:
                    return at + found
        return start

    def _resize(self, size: int) -> None:
        self.stored.forget([(size, max(size, self.copy.size_bytes))])
        if size < self.copy.size_bytes:
            self.taken.cut(size)
        self.copy.resize(size)
        self.taken.size_bytes = size

    def _is_same(self, standing: Standing, start: int) -> bool:
        """Whether the block at `start` is as in the newest version, but for what was written here."""
        base, newest, end = standing.body, self.newest, start + self.block_bytes
        if standing.cut_to < min(end, base.inode.size_bytes):
            return False
        if newest.inode.size_bytes < min(end, base.inode.size_bytes) and not self.clean:
            return False  # cut elsewhere, also where there was a hole: something may have been written there
        length = min(self.block_bytes, max(base.inode.size_bytes, newest.inode.size_bytes) - start)
        if base.inode.is_inline or newest.inode.is_inline or base.inode.size_bytes < start + length:
            return False
        return self._pieces(base, start, length) == self._pieces(newest, start, length)

    def _pieces(self, body: Body, start: int, length: int) -> list[extents.Piece]:
        return extents.pieces(body.inode.extents, start, length)

    async def _take_block(self, standing: Standing, start: int) -> None:
        theirs = bytes(await self.reader.pread(self.newest, start, self.block_bytes))
        try:
            before = bytes(await self.reader.pread(standing.body, start, self.block_bytes))
            before = before[: max(0, standing.cut_to - start)]
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
        at = start
        with trio.CancelScope(shield=True):  # a part of it would be there twice
            while at < self.copy.size_bytes:
                data = await self.copy.read(at, self.block_bytes)
                await self.copy.write(end + at - start, data)
                at += len(data)
        self.stored.forget([(end, at)])
        self.taken.append_from = end
        self._resize(end + at - start)
