"""OpenFile: what this mount knows of one open inode's body, shared by all its handles.

Lock order
    1. `_committing`: commit, truncate, punch, grow. May be held for as long as an upload takes.
    2. `_writing`:    write, append; truncate, punch and grow while they change what is staged.
The state (`file_state.py`) changes between two awaits, never across one, and is looked at again after each.

Rules
1. What a commit takes along is frozen: bytes written meanwhile stay dirty for the next one (`staging.py`).
2. A truncation never resurrects bytes: it ends an upload under way (which begins anew after it), waits for a
   transaction under way, and drops what is staged past the new size before anything else is committed.
3. What was appended (O_APPEND) moves as a whole when the file turns out to have grown elsewhere. While a transaction is
   under way the base is not replaced: the outcome may be in there already, and would be counted twice.
4. A transaction whose outcome is unknown is settled before the next: the newest body tells whether it has its blob.
5. An orphan (no name any more) lives on locally: everything works, nothing is committed.
6. With the session everything uncommitted goes, and each handle reports it once.
7. A commit that failed leaves everything dirty. The next fsync, close or background commit tries again, and reports its
   own outcome; so an error of a background commit is seen by the next fsync or close that can't put it right.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import trio

from apollofs.blobstore import Buffer
from apollofs.fs.commit_copies import CommitCopies
from apollofs.fs.config import BodyConfig
from apollofs.fs.early_blocks import EarlyBlocks
from apollofs.fs.errors import BodyLost, BodyUnavailable, MissingBlob
from apollofs.fs.file_state import FileState
from apollofs.fs.late_errors import ErrorCursor, LateErrors
from apollofs.fs.reader import AccessPattern, Reader
from apollofs.fs.staging import StagingArea
from apollofs.fs.stored_blocks import BlockUploads
from apollofs.fs.writer import BodyVolume, Writer
from apollofs.metadata import extents
from apollofs.metadata.errors import FileTooLarge, InvalidArgument, SessionLost, StaleInode
from apollofs.metadata.records import FILE_BYTES_MAX, Body, BodyChange, Inode, SetAttr

SEGMENTS_MAX = 4096
"""A file with so many staged stretches is committed before it is written further."""


@dataclass(frozen=True, slots=True)
class BodyTools:
    """What all open files of a mount share."""

    volume: BodyVolume
    reader: Reader
    writer: Writer
    staging: StagingArea
    uploads: BlockUploads
    config: BodyConfig
    copies: CommitCopies
    growing: set[OpenFile]
    """Those of which a block or more is staged."""


class OpenFile:
    """Made by `Bodies.open`; closed by `Bodies.close`."""

    def __init__(self, tools: BodyTools, body: Body) -> None:
        self.ino = body.inode.ino
        self.errors = LateErrors()
        self._tools = tools
        self._state = FileState(body, tools.staging.open_file(self.ino))
        self._committing = trio.Lock()
        self._writing = trio.Lock()
        self._upload: trio.CancelScope | None = None
        self._early: EarlyBlocks | None = None
        self.closing_since_s = -float("inf")
        """When a descriptor that may write was last closed, by trio's clock: its release follows in a moment."""
        self.is_lost = False
        """Whether what was written can't be committed any more, nor forgotten yet: every fsync and close says so."""
        self.is_unsure = False
        """Whether the session under which this was read is gone, and nothing newer has been read since."""

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def inode(self) -> Inode:
        """The inode as processes of this mount see it: size and times with what was written here."""
        return self._state.inode

    @property
    def body(self) -> Body:
        """The newest committed body known, with what was punched here."""
        return self._state.base()

    @property
    def version(self) -> int:
        """body_version of the newest committed body known."""
        return self._state.version

    @property
    def version_in_use(self) -> int:
        """The oldest body_version whose blobs are still needed: the base's, or that which a commit began on."""
        return self._state.version_in_use

    @property
    def shown(self) -> tuple[int, int]:
        """Size in bytes and mtime in ns, as processes of this mount see them."""
        inode = self.inode
        return inode.size_bytes, inode.mtime_ns

    @property
    def size_bytes(self) -> int:
        return self._state.size_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes that are not holes, stored or staged."""
        return extents.stored_bytes(self._state.layout())

    @property
    def is_dirty(self) -> bool:
        """Whether a commit has something to do."""
        return self._state.is_dirty

    @property
    def dirty_since_s(self) -> float | None:
        """When the oldest uncommitted change was made, by trio's clock."""
        return self._state.dirty_since_s if self._state.is_dirty else None

    @property
    def orphaned(self) -> bool:
        return self._state.orphaned

    def adopt(self, inode: Inode) -> None:
        """Attributes were read or set; older ones than those known are ignored. The body: see `refresh`."""
        self._state.adopt(inode)

    @asynccontextmanager
    async def expecting_mtime(self, mtime_ns: int) -> AsyncIterator[None]:
        """utimensat after a write: the commit of that write keeps this time, unless setting it, in the block, fails."""
        before, self._state.mtime_ns = self._state.mtime_ns, mtime_ns
        try:
            await self._state.wait_for_transaction()
            yield
        except BaseException:
            if self._state.mtime_ns == mtime_ns:
                self._state.mtime_ns = before
            raise

    async def seek_data(self, offset: int) -> int:
        """SEEK_DATA. NoDataThere at or past the end, or where only a hole follows."""
        return self._state.seek_data(offset)

    async def seek_hole(self, offset: int) -> int:
        """SEEK_HOLE; the end of the file counts as one. NoDataThere at or past the end."""
        return self._state.seek_hole(offset)

    # -- others ------------------------------------------------------------------------------------------------------

    async def refresh(self, inode: Inode, body: Body | None = None) -> None:
        """`inode` was just read: take over its attributes, and its body if another mount has changed that.

        One request if so, unless `body` was read with it. Waits for a transaction under way, not for an upload. Raises
        what `Volume.read_body` does.
        """
        state = self._state
        if body is not None and body.inode.body_version > state.version:
            self._rebase(body)
        while not state.orphaned and inode.body_version > state.version:
            await state.wait_for_transaction()
            await self._settle_doubt()
            self._rebase(await self._tools.volume.read_body(self.ino))
        state.adopt(inode)
        self.is_unsure = False

    def orphan(self) -> None:
        """The inode has lost its last name, here or elsewhere: keep all that was written here, commit nothing."""
        self._state.orphan()

    def session_lost(self) -> None:
        """Drop what is not committed; every handle reports it once. Others may have changed the rest since. No
        checkpoint."""
        self.is_unsure = True
        if self._early is not None:
            self._early.session_lost()
        if self._state.lose():
            self.errors.record(BodyLost(f"inode {self.ino:#x}: what was not committed is gone with the session"))

    def close(self) -> None:
        """Give up what is staged. Nobody may be using the file."""
        self._tools.growing.discard(self)
        self._state.staged.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, offset: int, size: int, pattern: AccessPattern | None = None) -> Buffer:
        """Bytes `[offset, offset + size)` as of one moment; fewer only at the end of the file.

        Raises BodyUnavailable, CorruptBody, StagingFailed.
        """
        known = self._state.version
        try:
            return await self._read(offset, size, pattern)
        except MissingBlob:
            # Another mount may have replaced the body, and its blobs may have been collected, since this read began.
            if self._state.version == known:
                if self._state.orphaned:
                    raise
                body = await self._tools.volume.read_body(self.ino)
                if body.inode.body_version <= known:
                    raise
                await self.refresh(body.inode, body)
        return await self._read(offset, size, pattern)

    async def _read(self, offset: int, size: int, pattern: AccessPattern | None) -> Buffer:
        state, staged = self._state, self._state.staged
        size = min(size, state.size_bytes - offset)
        if size <= 0:
            return b""
        found = staged.map.within(offset, size)
        if not found:
            data = await self._tools.reader.pread(state.base(), offset, size, pattern)
            return data if len(data) == size else bytes(data).ljust(size, b"\0")
        with staged.pinned():
            if len(found) == 1 and found[0].length == size:
                return await staged.read(found[0])
            whole = bytearray(size)
            if sum(segment.length for segment in found) < size:
                data = await self._tools.reader.pread(state.base(), offset, size, pattern)
                whole[: len(data)] = data
            for segment in found:
                start = segment.offset - offset
                whole[start : start + segment.length] = await staged.read(segment)
            return bytes(whole)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes, cursor: ErrorCursor | None = None) -> int:
        """Stage `data` at `offset`; returns how many bytes, which is all. No checkpoint if they are few.

        Raises FileTooLarge, StagingFull, StagingFailed (nothing is changed), BodyLost once after a lost session; and
        what `commit` raises where the file is in too many pieces to be written further.
        """
        return await self._write(offset, data, cursor)

    async def append(self, data: bytes, cursor: ErrorCursor | None = None) -> int:
        """As `write`, at the end of the file; if it grows elsewhere until the commit, behind that."""
        return await self._write(None, data, cursor)

    async def _write(self, offset: int | None, data: bytes, cursor: ErrorCursor | None) -> int:
        self.errors.report(cursor)
        if len(self._state.staged.map) >= SEGMENTS_MAX and not self._state.orphaned:
            await self.commit(cursor)
        try:
            self._writing.acquire_nowait()
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            end = (self._state.size_bytes if offset is None else offset) + len(data)
            if end > FILE_BYTES_MAX:
                raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            if offset is None:
                await self._state.staged.append(data, self._state.note_append)
            else:
                await self._state.staged.write(offset, data)
            self._state.note_dirty()
        finally:
            self._writing.release()
        if self._state.staged.disk_bytes >= self._tools.uploads.block_bytes:
            self._tools.growing.add(self)
        return len(data)

    async def truncate(self, change: SetAttr) -> Inode:
        """setattr with a size, at once, for all mounts. Returns the inode as `inode` does.

        One request, one more if another mount has changed the body too. Raises what `Volume.setattr` does.
        """
        size = change.size_bytes
        assert size is not None
        self._yield_to_truncation()
        async with self._committing, self._writing:
            await self._settle_doubt()
            inode, body = None, None
            if not self._state.orphaned:
                try:
                    inode, body = await self._resize(change)
                except StaleInode:
                    self._state.orphan()
            self._state.truncated(size, inode, body)
        return self.inode

    async def _resize(self, change: SetAttr) -> tuple[Inode, Body | None]:
        """The reply, and the whole body if it can't be known from the base."""
        known = self._state.version
        inode = await self._tools.volume.setattr(self.ino, change)
        if inode.body_version == known + 1:
            return inode, None
        # The size is set: what is here past it must go even if the next request fails.
        assert change.size_bytes is not None
        self._cut_here(change.size_bytes)
        return inode, await self._tools.volume.read_body(self.ino)

    def _cut_here(self, size: int) -> None:
        self._state.staged.drop(size)

    def _yield_to_truncation(self) -> None:
        if self._upload is not None and not self._state.is_transacting:
            self._upload.cancel()

    async def punch(self, offset: int, length: int, *, keep_size: bool, cursor: ErrorCursor | None = None) -> None:
        """Make a range a hole, for all mounts, committed with all that was written. `keep_size` False: the file then
        reaches at least to the range's end (FALLOC_FL_ZERO_RANGE).

        Raises InvalidArgument, FileTooLarge, and what `commit` raises; then it is done here, and committed later.
        """
        check_range(offset, length)
        async with self._committing, self._writing:
            await self._settle_doubt()
            self._state.punch(offset, length)
            if not keep_size:
                self._state.grow(offset + length)
        await self.commit(cursor)

    async def grow(self, size: int, cursor: ErrorCursor | None = None) -> None:
        """The file is at least `size` bytes long, for all mounts; what is new is a hole. As `punch`."""
        if size > FILE_BYTES_MAX:
            raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        async with self._committing, self._writing:
            await self._settle_doubt()
            self._state.grow(size)
        await self.commit(cursor)

    async def share(self, plan: Callable[[Body], BodyChange | None]) -> BodyChange | None:
        """Commit what `plan`, given the newest body known, wants laid over it: extents of blobs that are there already.
        Returns that; None if the plan wants nothing, or the file has lost its name. One request.

        Raises BodyConflict (CloneSourceChanged), TooManyExtents, and what `commit_body` does else; then nothing is
        changed, or the outcome is unknown. What is staged stays so, as if it were written after.
        """
        async with self._committing:
            await self._settle_doubt()
            change = None if self._state.orphaned else plan(self._state.base())
            if change is None:
                return None
            try:
                with self._state.transacting(change):
                    inode = await self._tools.volume.commit_body(self.ino, change)
            except StaleInode:
                self._state.orphan()
                return None
            self._shared(Body(inode))
        return change

    def _shared(self, body: Body) -> None:
        """`share` has committed this."""
        self._state.rebase(body)

    # -- committing --------------------------------------------------------------------------------------------------

    async def ready_uploads(self) -> list[Callable[[], Awaitable[bool]]]:
        """Blocks to be stored before anybody asks for it (`EarlyBlocks.ready`). Raises BodyError."""
        if not self.is_dirty:
            self._tools.growing.discard(self)
            return []
        if self._early is None:
            if self._committing.locked():
                return []
            tools = self._tools
            self._early = EarlyBlocks(tools.uploads, self._state.staged, self._new_blob, tools.writer.keep)
            self._state.denied_hook = self._early.forget_blobs
        return self._early.ready()

    def _new_blob(self) -> int:
        blob = self._tools.volume.new_blob()
        self._tools.copies.begin(self._state.inode.policy, blob)
        return blob

    async def commit(self, cursor: ErrorCursor | None = None) -> None:
        """On return all that was written before the call is in the store and in etcd (of an orphan: nowhere).

        Raises BodyUnavailable, also at the deadline; BlobStoreFull; MetadataError; BodyLost once for each handle after
        a lost session. Failed or cancelled, everything stays dirty.
        """
        deadline_s = self._tools.config.commit_deadline_s
        try:
            with trio.fail_after(deadline_s):
                while self.is_dirty:
                    async with self._committing:
                        if await self._commit():
                            break
        except trio.TooSlowError as exc:
            raise BodyUnavailable(f"a commit did not end within {deadline_s:g} s") from exc
        except (BodyLost, SessionLost):
            self.errors.report(cursor)
            raise
        self.errors.report(cursor)

    async def _commit(self) -> bool:
        """Whether all went through; False if a truncation wants to go first."""
        try:
            await self._settle_doubt()
            if not self.is_dirty:
                return True
            with trio.CancelScope() as self._upload:
                await self._commit_flight()
                return True
            return False
        except StaleInode:
            self._state.orphan()
            return True
        finally:
            self._upload = None

    async def _commit_flight(self) -> None:
        self._state.take_off()
        try:
            async with self._early.held_still() if self._early is not None else nullcontext():
                committed = await self._tools.writer.commit(self._state, self._early)
        except BaseException:
            self._state.abort()
            raise
        self._state.land(committed)

    def _rebase(self, body: Body) -> None:
        """Unless it does not tell, or may not, what becomes of a transaction of ours."""
        if not (self._state.is_transacting or self._state.in_doubt):
            self._state.rebase(body)

    async def _settle_doubt(self) -> None:
        doubt, volume = self._state.doubt, self._tools.volume
        if doubt is not None:
            await volume.out_of_doubt()
            body = await volume.read_body(self.ino)
            if self._state.doubt is doubt:  # neither settled by somebody else meanwhile, nor lost with its session
                self._state.rebase(body, volume.fate_of(self.ino))


def check_range(offset: int, length: int) -> None:
    """Raises InvalidArgument (EINVAL), FileTooLarge (EFBIG)."""
    if offset < 0 or length <= 0:
        raise InvalidArgument("an empty or negative range")
    if offset + length > FILE_BYTES_MAX:
        raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
