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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from apollofs.blobstore.footer import Footer
from apollofs.fs.errors import BodyLost, BodyUnavailable, CopyCut, NoDataThere
from apollofs.fs.file_state import is_certain
from apollofs.fs.late_errors import ErrorCursor
from apollofs.fs.open_file import BodyTools, OpenFile, check_range
from apollofs.fs.reader import AccessPattern
from apollofs.fs.stored_blocks import StoredBlocks
from apollofs.fs.taking_over import Taken, TakingOver, as_committed
from apollofs.fs.working_copy import Moment, WorkingCopy
from apollofs.fs.writer import CONFLICTS_MAX
from apollofs.metadata import extents
from apollofs.metadata.errors import (
    BodyConflict,
    DeadlineExceeded,
    FileTooLarge,
    MetadataError,
    OutcomeUnknown,
    StaleInode,
    TooManyExtents,
)
from apollofs.metadata.records import FILE_BYTES_MAX, Body, BodyChange, Inode, SetAttr

REST_FACTOR = 20
"""A file that is written on and on is committed in the background so seldom that looking for what has changed takes
one part in so many of the time."""


class PassedFile(OpenFile):
    """Made by `Bodies.pass_through`, of a file that is empty and open nowhere else on this mount; or by
    `Bodies.make_private`, of one that is read by passthrough and now to be changed."""

    def __init__(self, tools: BodyTools, body: Body, copy: WorkingCopy) -> None:
        super().__init__(tools, body)
        self.copy = copy
        self._stored = StoredBlocks(tools.uploads, self._new_blob)
        self.has_readers = False
        """Whether descriptors, of before it became a working copy, read it by passthrough."""
        self._clean: Moment | None = copy.moment()
        self._attempted: BodyChange | None = None
        """Sent, and its outcome is not known."""
        self._taken = Taken()
        self._block_bytes = tools.uploads.block_bytes
        self._mtime_told_ns = 0
        """The copy's mtime after a change that the inode knows of already: a later write would have moved it."""
        self._dirty_seen_s: float | None = None
        self._rest_until_s = 0.0
        self.is_lost = False

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def inode(self) -> Inode:
        moment = self.copy.moment()
        inode = self._state.inode._replace(size_bytes=moment.size_bytes)
        if not self._is_told(moment):
            newest_ns = max(moment.ctime_ns, inode.ctime_ns)
            inode = inode._replace(mtime_ns=moment.mtime_ns, ctime_ns=newest_ns)
        return inode

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
        told_ns = self.copy.set_times(mtime_ns)
        try:
            await self._state.wait_for_transaction()
            yield
        except BaseException:
            self.copy.set_times(before_ns)
            raise
        self._mtime_told_ns = told_ns

    async def seek_data(self, offset: int) -> int:
        found = await self.copy.seek(offset, os.SEEK_DATA) if offset >= 0 else None
        if found is None:
            raise NoDataThere("no data at or after this offset")
        return found

    async def seek_hole(self, offset: int) -> int:
        found = await self.copy.seek(offset, os.SEEK_HOLE) if offset >= 0 else None
        if found is None:
            raise NoDataThere("the offset is not within the file")
        return found

    # -- others ------------------------------------------------------------------------------------------------------

    async def refresh(self, inode: Inode, body: Body | None = None) -> None:
        """As of an OpenFile. What has been changed here and is not committed stays."""
        while not self._state.orphaned and inode.body_version > self._state.version:
            await self._state.wait_for_transaction()
            await self._take_over()
        self._state.adopt(inode)
        self.is_unsure = False

    def session_lost(self) -> None:
        self.is_unsure = True
        if self.is_dirty or self._committing.locked():
            self.is_lost = True
            self.errors.record(self._lost())
            self._yield_to_truncation()
        else:
            self._stored.keep_only({extent.blob for extent in self._state.base().inode.extents})

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
                self._taken.append_from = size if self._taken.append_from is None else self._taken.append_from
            if offset + len(data) > FILE_BYTES_MAX:
                raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            await self.copy.write(offset, data)
        return len(data)

    async def truncate(self, change: SetAttr) -> Inode:
        size = change.size_bytes
        assert size is not None
        self._yield_to_truncation()
        async with self._committing, self._writing:
            if self._attempted is not None:
                await self._take_over_now()
            before, inode, body = self._state.base(), None, None
            size_before = self.copy.size_bytes
            if size > size_before:
                self.copy.resize(size)  # first, as the local disk may not be able to
            if not self._state.orphaned:
                try:
                    inode, body = await self._resize(change)
                except StaleInode:
                    self._state.orphan()
                except MetadataError as exc:
                    unsure = isinstance(exc, (OutcomeUnknown, DeadlineExceeded))
                    if size > size_before and self.copy.size_bytes == size and not unsure:
                        self.copy.resize(size_before)
                    raise
            self._cut_here(size)
            self._mtime_told_ns = self.copy.moment().mtime_ns
            self._state.truncated(size, inode, None)
            if body is not None:
                # others have changed it too: what they did is newer than the base, which is only cut
                self._state.replace_base(before)
                await self._take_over_now()
        return self.inode

    def _cut_here(self, size: int) -> None:
        self._taken.truncated(size)
        self._stored.forget([(size, max(size, self.copy.size_bytes))])
        self.copy.resize(size)

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

    def _shared(self, body: Body) -> None:
        """The copy lags behind now, as after a commit of another mount, and takes over what was shared when it is next
        looked at. If nobody does before it is closed, no byte is moved."""

    # -- committing --------------------------------------------------------------------------------------------------

    async def ready_uploads(self) -> list[Callable[[], Awaitable[bool]]]:
        """Blocks to be stored before anybody asks for it (`StoredBlocks.ready`)."""
        if not self._may_store():
            return []
        ready = await self._stored.ready(self.copy)
        return ready if self._may_store() else []

    def _may_store(self) -> bool:
        return not (self.is_lost or self._state.orphaned or self.copy.closed)

    def refer_to_all(self, footers: Sequence[Footer | None]) -> None:
        """The copy holds the body as it is, with these checksums by block."""
        for index, footer in enumerate(footers):
            if footer is not None:
                start = index * self._block_bytes
                pieces = extents.pieces(self.body.inode.extents, start, footer.data_length)
                self._stored.refer(index, footer, tuple(piece.extent for piece in pieces if piece.extent is not None))
        self.copy.set_times(self._state.base().inode.mtime_ns)
        self._clean = self.copy.moment()
        self._mtime_told_ns = self._clean.mtime_ns

    def footers(self) -> list[Footer] | None:
        """The checksums of all blocks, once nobody writes any more and all is committed; None if there are holes."""
        return self._stored.footers(self.copy.size_bytes)

    async def commit(self, cursor: ErrorCursor | None = None) -> None:
        await super().commit(cursor)
        self.check_usable()

    async def _commit_flight(self) -> None:
        try:
            await self._commit_copy()
        finally:
            self._stored.commit_ended()

    async def _commit_copy(self) -> None:
        began_s = trio.current_time()
        session = self._tools.volume.session
        for _ in range(CONFLICTS_MAX):
            self.check_usable()
            moment = self.copy.moment()
            try:
                change = await self._prepare(moment)
                if change is None:
                    break
                before, self._attempted = self._attempted, change
                with self._state.transacting(change):
                    inode = await self._tools.volume.commit_body(self.ino, change, session)
            except CopyCut:
                continue
            except BodyConflict:
                self._attempted = before  # it may have been applied after all
                await self._take_over()
            except TooManyExtents:
                self._attempted = before
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
        told = size == base.inode.size_bytes and self._is_told(moment)
        if size <= self._tools.volume.superblock.inline_bytes_max:
            data = await self.copy.read(0, size)
            if len(data) < size:
                raise CopyCut("the file became shorter while it was read")
            self._stored.clear()
            if told and data == base.inline:
                return None
            return BodyChange(base.inode.body_version, size, inline=data, mtime_ns=self._mtime_ns())
        await self._stored.bring_up(self.copy, size)
        layout = self._stored.layout(size)
        # whether anything was stored just now does not matter: earlier uploads and commits that failed may have done so
        if told and not base.inode.is_inline and layout == extents.merge(base.inode.extents):
            return None
        self._stored.finish_blobs(size)
        before = {extent.blob for extent in base.inode.extents}
        new = [extent for extent in layout if extent.blob not in before]
        return BodyChange(
            base.inode.body_version,
            size,
            extents=layout,
            copies=await self._tools.copies.settle(base.inode.policy, new),
            rewrites_all=True,
            lifts_inline=base.inode.is_inline,
            mtime_ns=self._mtime_ns(),
        )

    def _is_told(self, moment: Moment) -> bool:
        """Whether the inode knows of the copy's times, so that nothing need be committed if the bytes are the same."""
        last = self._clean
        unmoved = last is not None and (last.size_bytes, last.ctime_ns) == (moment.size_bytes, moment.ctime_ns)
        return unmoved or moment.mtime_ns == self._mtime_told_ns

    def _mtime_ns(self) -> int:
        """That of the copy, or what the inode has where the disk may not know that."""
        mtime_ns = self.copy.moment().mtime_ns
        return (self._state.inode.mtime_ns if mtime_ns == self._mtime_told_ns else mtime_ns) or 1

    def _committed(self, body: Body) -> None:
        self._taken.committed(body.inode.size_bytes, self.copy.size_bytes)
        self._replace_base(body)

    def _replace_base(self, body: Body) -> None:
        """The newest body known. What is not in it any more will be collected."""
        kept = {extent.blob for extent in body.inode.extents}
        self._stored.forget_blobs({extent.blob for extent in self._state.base().inode.extents} - kept)
        self._state.replace_base(body)

    async def _settle_doubt(self) -> None:
        if self._attempted is not None:
            await self._take_over()

    # -- what others have written ------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Bring the newest body into the copy. What the daemon is to write waits meanwhile. Not while a transaction is
        under way. Raises what reading does."""
        async with self._writing:
            await self._take_over_now()

    async def _take_over_now(self) -> None:
        """`_writing` is held. A change of unknown outcome that the newest body shows is ours, and nobody else's."""
        attempted = self._attempted if not self._state.is_transacting else None
        if attempted is not None:
            await self._tools.volume.out_of_doubt()
        newest = await self._tools.volume.read_body(self.ino)
        if self._state.is_transacting:
            return
        if attempted is not None and attempted is self._attempted:
            self._attempted = None
            fate = self._tools.volume.fate_of(self.ino)
            shown = as_committed(attempted, self._state.base(), newest, fate)
            if shown is not None:
                self._committed(shown)
            elif fate is None and newest.inode.body_version > self.version:
                # it may have been applied all the same, and its blobs may be garbage by now
                mine = {extent.blob for extent in self._state.base().inode.extents}
                self._stored.forget_blobs({extent.blob for extent in attempted.extents} - mine)
        base = self._state.base()
        if newest.inode.body_version <= base.inode.body_version:
            return
        moment = self.copy.moment()
        told, clean = self._is_told(moment), self._is_clean(moment)
        await TakingOver(
            self.copy, self._stored, self._tools.reader, self._block_bytes, base, newest, self._taken, clean
        ).run()
        self._replace_base(newest)
        self._clean = None
        if told:
            self._mtime_told_ns = self.copy.set_times(newest.inode.mtime_ns)
