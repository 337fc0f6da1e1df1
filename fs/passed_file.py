"""PassedFile: an open file that processes of this host write by themselves, into a working copy (passthrough).

The daemon sees OPEN, fsync, FLUSH, RELEASE, truncation and what comes through descriptors that must be seen (O_APPEND,
O_SYNC, read and write); of write(2) it sees nothing. So:

1. Whether something was written shows in the copy's size and ctime; what, by comparing checksums when it is committed.
2. Whole blocks behind the writing front are stored while the file grows (`upload_ready`). A commit stores what differs
   from what is stored, and lays down the whole list of extents, provided that nobody else has changed the body.
3. If somebody has, the bytes that they changed are taken over into the copy, except where they were changed here too;
   then the commit begins anew. So both keep their bytes.
4. With the session everything uncommitted is lost: the copy is never committed again, every fsync and close of its
   descriptors says so, and the file can't be opened here until they are closed.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from apollofs.blobstore.footer import Footer
from apollofs.fs.differences import differing, without
from apollofs.fs.errors import BodyLost, BodyUnavailable, CopyCut, MissingBlob, NoDataThere
from apollofs.fs.file_state import is_certain
from apollofs.fs.late_errors import ErrorCursor
from apollofs.fs.open_file import BodyTools, OpenFile, check_range
from apollofs.fs.reader import AccessPattern
from apollofs.fs.stored_blocks import StoredBlocks
from apollofs.fs.working_copy import Moment, WorkingCopy
from apollofs.fs.writer import CONFLICTS_MAX
from apollofs.metadata import extents
from apollofs.metadata.errors import BodyConflict, FileTooLarge, StaleInode, TooManyExtents
from apollofs.metadata.records import FILE_BYTES_MAX, Body, BodyChange, Inode, SetAttr

REST_FACTOR = 20
"""A file that is written on and on is committed in the background so seldom that looking for what has changed takes
one part in so many of the time."""


class PassedFile(OpenFile):
    """Made by `Bodies.pass_through`, of a file that is empty and open nowhere else on this mount."""

    def __init__(self, tools: BodyTools, body: Body, copy: WorkingCopy) -> None:
        super().__init__(tools, body)
        self.copy = copy
        self._stored = StoredBlocks(tools.uploads, tools.volume.new_blob)
        self._clean: Moment | None = copy.moment()
        self._attempted: BodyChange | None = None
        """Sent, and its outcome is not known."""
        self._append_from: int | None = None
        self._dirty_seen_s: float | None = None
        self._rest_until_s = 0.0
        self.is_lost = False

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def inode(self) -> Inode:
        moment = self.copy.moment()
        inode = self._state.inode._replace(size_bytes=moment.size_bytes)
        if not self._is_clean(moment):
            newest_ns = max(moment.ctime_ns, inode.ctime_ns)
            inode = inode._replace(mtime_ns=moment.mtime_ns, ctime_ns=newest_ns)
        return inode

    @property
    def shown(self) -> tuple[int, int]:
        inode = self.inode
        return inode.size_bytes, inode.mtime_ns

    @property
    def size_bytes(self) -> int:
        return self.copy.size_bytes

    @property
    def allocated_bytes(self) -> int:
        moment = self.copy.moment()
        if self._is_clean(moment):
            return self._state.base().inode.allocated_bytes
        return min(moment.allocated_bytes, moment.size_bytes)

    def _is_clean(self, moment: Moment) -> bool:
        return self._clean is not None and self._clean.is_same(moment)

    @property
    def is_dirty(self) -> bool:
        if self._state.orphaned or self.is_lost or self.copy.closed:
            return False
        return self._attempted is not None or not self._is_clean(self.copy.moment())

    @property
    def dirty_since_s(self) -> float | None:
        """When it was first seen to be dirty; None also while it rests after a commit in the background."""
        now = trio.current_time()
        if not self.is_dirty or now < self._rest_until_s:
            self._dirty_seen_s = None
        elif self._dirty_seen_s is None:
            self._dirty_seen_s = now
        return self._dirty_seen_s

    @asynccontextmanager
    async def expecting_mtime(self, mtime_ns: int) -> AsyncIterator[None]:
        before_ns = self.copy.moment().mtime_ns
        self.copy.set_times(mtime_ns)
        try:
            await self._state.wait_for_transaction()
            yield
        except BaseException:
            self.copy.set_times(before_ns)
            raise

    def seek_data(self, offset: int) -> int:
        found = self.copy.seek(offset, os.SEEK_DATA) if offset >= 0 else None
        if found is None:
            raise NoDataThere("no data at or after this offset")
        return found

    def seek_hole(self, offset: int) -> int:
        found = self.copy.seek(offset, os.SEEK_HOLE) if offset >= 0 else None
        if found is None:
            raise NoDataThere("the offset is not within the file")
        return found

    # -- others ------------------------------------------------------------------------------------------------------

    async def refresh(self, inode: Inode, body: Body | None = None) -> None:
        """As of an OpenFile. While something is uncommitted here the body of others waits for the next commit."""
        while not self._state.orphaned and inode.body_version > self._state.version and not self.is_dirty:
            await self._state.wait_for_transaction()
            if self._committing.locked():
                break  # the commit that is under way will meet it
            async with self._committing:
                newest = body or await self._tools.volume.read_body(self.ino)
                if newest.inode.body_version > self._state.version:
                    await self._take_over(newest)
            body = None
        self._state.adopt(inode)
        self.is_unsure = False

    def session_lost(self) -> None:
        self.is_unsure = True
        if self.is_dirty or self._committing.locked():
            self.is_lost = True
            self.errors.record(self._lost())
            self._yield_to_truncation()

    def check_usable(self) -> None:
        """Whether it may be opened once more. Raises BodyLost."""
        if self.is_lost:
            raise self._lost()

    def _lost(self) -> BodyLost:
        return BodyLost(f"inode {self.ino:#x}: what was not committed is gone with the session")

    def close(self) -> None:
        """Give up the copy; what was lost with a session is left on the disk, where it can be recovered."""
        super().close()
        self.copy.close(keep=self.is_lost or self.is_dirty)

    # -- reading and writing through the daemon ----------------------------------------------------------------------

    async def read(self, offset: int, size: int, pattern: AccessPattern | None = None) -> bytes:
        return await self.copy.read(offset, max(0, min(size, self.copy.size_bytes - offset)))

    async def _write(self, offset: int | None, data: bytes, cursor: ErrorCursor | None) -> int:
        self.errors.report(cursor)
        async with self._writing:
            size = self.copy.size_bytes
            if offset is None:
                offset = size
                self._append_from = size if self._append_from is None else self._append_from
            if offset + len(data) > FILE_BYTES_MAX:
                raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            await self.copy.write(offset, data)
        return len(data)

    async def truncate(self, change: SetAttr) -> Inode:
        size = change.size_bytes
        assert size is not None
        self._yield_to_truncation()
        async with self._committing, self._writing:
            await self._settle_doubt()
            before, inode, body = self._state.base(), None, None
            if not self._state.orphaned:
                try:
                    inode, body = await self._resize(change)
                except StaleInode:
                    self._state.orphan()
            self._stored.forget([(size, max(size, self.copy.size_bytes))])
            self.copy.resize(size)
            self._append_from = None
            self._state.truncated(size, inode, None)
            if body is not None and body.inode.body_version > before.inode.body_version + 1:
                await self._take_over(body)
        return self.inode

    async def punch(self, offset: int, length: int, *, keep_size: bool, cursor: ErrorCursor | None = None) -> None:
        check_range(offset, length)
        async with self._committing, self._writing:
            self.copy.punch(offset, length)
            if not keep_size and offset + length > self.copy.size_bytes:
                self.copy.resize(offset + length)
        await self.commit(cursor)

    async def grow(self, size: int, cursor: ErrorCursor | None = None) -> None:
        check_range(0, size)
        async with self._committing, self._writing:
            if size > self.copy.size_bytes:
                self.copy.resize(size)
        await self.commit(cursor)

    # -- committing --------------------------------------------------------------------------------------------------

    def ready_uploads(self) -> list[Callable[[], Awaitable[bool]]]:
        """Blocks to be stored before anybody asks for it (`StoredBlocks.ready`)."""
        if self.is_lost or self._state.orphaned or self.copy.closed:
            return []
        return self._stored.ready(self.copy)

    def footers(self) -> list[Footer] | None:
        """The checksums of all blocks, once nobody writes any more and all is committed; None if there are holes."""
        return self._stored.footers(self.copy.size_bytes)

    async def commit(self, cursor: ErrorCursor | None = None) -> None:
        await super().commit(cursor)
        self.check_usable()

    async def _commit_flight(self) -> None:
        began_s = trio.current_time()
        session = self._tools.volume.session
        for _ in range(CONFLICTS_MAX):
            self.check_usable()
            moment = self.copy.moment()
            try:
                change = await self._prepare(moment)
                if change is None:
                    break
                self._attempted = change
                with self._state.transacting(change):
                    inode = await self._tools.volume.commit_body(self.ino, change, session)
            except CopyCut:
                continue
            except BodyConflict:
                self._attempted = None
                await self._take_over(await self._tools.volume.read_body(self.ino))
            except TooManyExtents:
                self._attempted = None
                self._stored.clear()
            except BaseException as exc:
                if is_certain(exc):
                    self._attempted = None
                raise
            else:
                self._attempted = None
                self._committed(Body(inode, change.inline or b""))
                break
        else:
            raise BodyUnavailable(f"inode {self.ino:#x} was changed by others at each of {CONFLICTS_MAX} attempts")
        self._clean = moment
        now = trio.current_time()
        self._rest_until_s = now + REST_FACTOR * (now - began_s)

    async def _prepare(self, moment: Moment) -> BodyChange | None:
        """Store what differs; the change that says so, or None if nothing has changed at all."""
        base, size = self._state.base(), moment.size_bytes
        last = self._clean
        unmoved = last is not None and (last.size_bytes, last.ctime_ns) == (size, moment.ctime_ns)
        if size <= self._tools.volume.superblock.inline_bytes_max:
            data = await self.copy.read(0, size)
            if len(data) < size:
                raise CopyCut("the file became shorter while it was read")
            self._stored.clear()
            if unmoved and data == base.inline:
                return None
            return BodyChange(base.inode.body_version, size, inline=data, mtime_ns=self._mtime_ns())
        changed = await self._stored.bring_up(self.copy, size)
        if unmoved and not changed:
            return None
        self._stored.finish_blobs()
        return BodyChange(
            base.inode.body_version,
            size,
            extents=self._stored.extents(size),
            rewrites_all=True,
            lifts_inline=base.inode.is_inline,
            mtime_ns=self._mtime_ns(),
        )

    def _mtime_ns(self) -> int:
        return self.copy.moment().mtime_ns or 1

    def _committed(self, body: Body) -> None:
        self._append_from = None
        self._state.replace_base(body)

    async def _settle_doubt(self) -> None:
        """What has become of a change whose outcome was unknown."""
        change = self._attempted
        if change is None:
            return
        newest = await self._tools.volume.read_body(self.ino)
        self._attempted = None
        if newest.inode.body_version == self._state.version:
            return
        shows_inline = change.inline is not None and newest.inline == change.inline
        if shows_inline or (change.extents and newest.inode.extents == change.extents):
            self._committed(newest)
        else:
            await self._take_over(newest)

    # -- what others have written ------------------------------------------------------------------------------------

    async def _take_over(self, newest: Body) -> None:
        """Bring into the copy what others have changed of the body since the base, except where it was changed here.

        `_committing` is held. Raises what reading does; what is done by then is done, and doing it again is harmless.
        """
        base = self._state.base()
        if self._append_from is not None and newest.inode.size_bytes > self._append_from:
            await self._move_appended(newest.inode.size_bytes - self._append_from)
        grown_here = self.copy.size_bytes > base.inode.size_bytes
        if newest.inode.size_bytes > self.copy.size_bytes or not grown_here:
            self.copy.resize(newest.inode.size_bytes)
        step = self._tools.uploads.block_bytes
        for start in range(0, newest.inode.size_bytes, step):
            if not _is_same(base, newest, start, step):
                await self._take_over_block(base, newest, start, step)
        self._state.replace_base(newest)
        self._clean = None

    async def _take_over_block(self, base: Body, newest: Body, start: int, length: int) -> None:
        theirs = await self._tools.reader.pread(newest, start, length)
        ours = await self.copy.read(start, length)
        try:
            before = await self._tools.reader.pread(base, start, length)
        except MissingBlob:
            before = ours  # collected since: nothing tells what was changed here
        # What is past the old end was written here if it is more than the hole that a resize has left.
        changed = list(differing(before.ljust(len(ours), b"\0"), ours, start))
        written = list(without(differing(before, theirs, start), changed))
        for low, high in written:
            await self.copy.write(low, theirs[low - start : high - start])
        self._stored.forget(written)

    async def _move_appended(self, distance: int) -> None:
        """What was appended here goes behind what was appended elsewhere."""
        assert self._append_from is not None
        start, end = self._append_from, self.copy.size_bytes
        await self.copy.move(start, end, distance)
        # what lay there is not ours any more; what was appended elsewhere is written over it
        self.copy.punch(start, min(distance, end - start))
        self._stored.forget([(start, end + distance)])
        self._append_from += distance


def _is_same(base: Body, newest: Body, start: int, length: int) -> bool:
    """Whether two versions refer to the same bytes in a stretch."""
    if base.inode.is_inline or newest.inode.is_inline:
        return base.inline[start : start + length] == newest.inline[start : start + length] != b""
    before = extents.pieces(base.inode.extents, start, length)
    return before == extents.pieces(newest.inode.extents, start, length)
