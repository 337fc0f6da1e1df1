"""OpenFile: what this mount knows of one open inode's body, shared by all its handles.

The file as its readers here see it is, from below: the *base* (the newest committed body known), *holes* punched and
not yet committed, and the *staged* bytes. A commit stores the staged bytes, lays them over whatever is newest, and what
comes back is the new base.

Lock order
    1. `_committing`: commit, truncate, punch, grow. May be held for as long as an upload takes.
    2. `_writing`:    write, append; truncate and punch while they change what is staged. Held for a local write.
State changes between two awaits otherwise, and is looked at again after each.

Rules
1. What a commit takes along is frozen by a snapshot: bytes written meanwhile stay dirty (`staging.py`).
2. A truncation never resurrects bytes: it ends an upload under way (which begins anew after it), waits for a
   transaction under way, and drops what is staged past the new size before anything else is committed.
3. What was appended (O_APPEND) lies at or past `append_from`, and moves as a whole when the base turns out to have
   grown elsewhere. While a transaction is under way the base is not replaced: its outcome may be in there already.
4. A transaction whose outcome is unknown is settled before the next one: the newest body tells whether it has its blob.
5. An orphan (no name any more) lives on locally: everything works, nothing is committed.
6. With the session everything uncommitted goes, and each handle reports it once.
7. A commit that failed leaves everything dirty: the next fsync, close or background commit tries again, and its own
   outcome is what it reports.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyError, BodyLost, BodyUnavailable, MissingBlob, NoDataThere
from apollofs.fs.late_errors import ErrorCursor, LateErrors
from apollofs.fs.plan import Dirty, layout, without_holes
from apollofs.fs.reader import AccessPattern, Reader
from apollofs.fs.segments import Segment, shifted
from apollofs.fs.settling import distance_if_applied, outcome_is_known
from apollofs.fs.staging import StagingArea, StagingFile
from apollofs.fs.writer import BodyVolume, Committed, Writer
from apollofs.metadata import extents
from apollofs.metadata.errors import FileTooLarge, MetadataError, StaleInode
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
    config: BodyConfig


class OpenFile:
    """Made by `Bodies.open`. Errors: leaves of BodyError, MetadataError, BlobStoreFull, as each method says."""

    def __init__(self, tools: BodyTools, body: Body) -> None:
        self.ino = body.inode.ino
        self.errors = LateErrors()
        self.orphaned = False
        self._tools = tools
        self._base = body
        self._holes: tuple[tuple[int, int], ...] = ()
        self._view: Body | None = body
        self._staged: StagingFile = tools.staging.open_file(self.ino)
        self._grown_to = 0
        self._append_from: int | None = None
        self._mtime_ns = 0
        self._layout: tuple[tuple[int, int], extents.Extents] | None = None
        self._base_changes = 0
        self._committing = trio.Lock()
        self._writing = trio.Lock()
        self._flight: Dirty | None = None
        self._doubt: tuple[Dirty, BodyChange] | None = None
        self._upload_scope: trio.CancelScope | None = None
        self._settled: trio.Event | None = None

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return max(self._base.inode.size_bytes, self._staged.map.end, self._grown_to)

    @property
    def is_dirty(self) -> bool:
        """Whether a commit has something to do."""
        return not self.orphaned and bool(self._staged.map or self._holes or self._grown_to or self._doubt)

    @property
    def inode(self) -> Inode:
        """The inode as processes of this mount see it: size and times with what was written here."""
        inode = replace(self._base.inode, size_bytes=self.size_bytes)
        if self._mtime_ns and self._staged.map:
            inode = replace(inode, mtime_ns=self._mtime_ns, ctime_ns=max(self._mtime_ns, inode.ctime_ns))
        return inode

    @property
    def allocated_bytes(self) -> int:
        """Bytes that are not holes, staged or stored."""
        return extents.stored_bytes(self._layout_now())

    def adopt(self, inode: Inode) -> None:
        """Newer attributes were read or set; the body is taken over by `refresh` only. Older ones are ignored."""
        base = self._base.inode
        if inode.revision < base.revision or inode.body_version < base.body_version:
            return
        kept = replace(
            inode,
            size_bytes=base.size_bytes,
            flags=base.flags if inode.body_version > base.body_version else inode.flags,
            extents=base.extents,
            inline_bytes=base.inline_bytes,
            body_version=base.body_version,
        )
        self._set_base(replace(self._base, inode=kept))

    def set_mtime(self, mtime_ns: int) -> None:
        """utimensat after a write: the commit of that write keeps this time."""
        self._mtime_ns = mtime_ns

    def seek_data(self, offset: int) -> int:
        """SEEK_DATA. NoDataThere at or past the end, or if only a hole follows."""
        found = extents.next_data(self._layout_now(), offset)
        if offset < 0 or found is None or found >= self.size_bytes:
            raise NoDataThere("no data at or after this offset")
        return found

    def seek_hole(self, offset: int) -> int:
        """SEEK_HOLE; the end of the file counts as one. NoDataThere at or past the end."""
        if not 0 <= offset < self.size_bytes:
            raise NoDataThere("the offset is not within the file")
        return min(extents.next_hole(self._layout_now(), offset), self.size_bytes)

    def _layout_now(self) -> extents.Extents:
        version = (self._base_changes, self._staged.map.version)
        if self._layout is None or self._layout[0] != version:
            self._layout = (version, layout(self.base(), self._staged.map.segments()))
        return self._layout[1]

    # -- the base ----------------------------------------------------------------------------------------------------

    def base(self) -> Body:
        """The newest committed body known, with the pending holes cut."""
        if self._view is None:
            self._view = without_holes(self._base, self._holes)
        return self._view

    def _set_base(self, body: Body) -> None:
        self._base = body
        self._view = None
        self._base_changes += 1

    def _set_holes(self, holes: tuple[tuple[int, int], ...]) -> None:
        self._holes = holes
        self._view = None
        self._base_changes += 1

    async def refresh(self, inode: Inode) -> None:
        """`inode` was just read: take over its attributes, and its body if another mount has changed that.

        One request if so. Waits for a transaction under way, not for an upload. Raises what `Volume.read_body` does.
        """
        if self.orphaned:
            return
        while inode.body_version > self._base.inode.body_version:
            if self._settled is not None:
                await self._settled.wait()
                continue
            body = await self._tools.volume.read_body(self.ino)
            if self._settled is None:
                self.rebase(body)
                return
        self.adopt(inode)

    def rebase(self, body: Body) -> None:
        """Replace the base by a newer body; what was appended here moves behind what was appended there."""
        if self.orphaned or body.inode.body_version < self._base.inode.body_version:
            return
        if self._doubt is not None:
            self._settle_doubt(body)
        old_size, new_size = self._base.inode.size_bytes, body.inode.size_bytes
        start = self._append_start()
        self._set_base(body)
        if start is not None and (new_size > start or start == old_size):
            self._move_appended(start, new_size - start)

    def _append_start(self) -> int | None:
        """From where on dirty bytes were appended, those of a commit under way too."""
        if self._flight is not None and self._flight.append_from is not None:
            return self._flight.append_from
        return self._append_from

    def _move_appended(self, start: int, distance: int) -> None:
        if not distance:
            return
        self._staged.shift(start, distance)
        if self._grown_to > start:
            self._grown_to += distance
        if self._append_from is not None:
            self._append_from += distance
        if self._flight is not None:
            self._flight = _moved(self._flight, start, distance)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, offset: int, size: int, pattern: AccessPattern | None = None) -> bytes:
        """Bytes `[offset, offset + size)` as of one moment; fewer only at the end of the file.

        Raises BodyUnavailable, CorruptBody, StagingFailed.
        """
        try:
            return await self._read_once(offset, size, pattern)
        except MissingBlob:
            # The body may have been replaced, and the blob collected, since the base was read.
            version = self._base.inode.body_version
            if self.orphaned:
                raise
            body = await self._tools.volume.read_body(self.ino)
            if body.inode.body_version <= version:
                raise
            await self.refresh(body.inode)
        return await self._read_once(offset, size, pattern)

    async def _read_once(self, offset: int, size: int, pattern: AccessPattern | None) -> bytes:
        size = min(size, self.size_bytes - offset)
        if size <= 0:
            return b""
        staged = self._staged.map.within(offset, size)
        if not staged:
            data = await self._tools.reader.pread(self.base(), offset, size, pattern)
            return data if len(data) == size else data.ljust(size, b"\0")
        with self._staged.pinned():
            if len(staged) == 1 and staged[0].length == size:
                return await self._staged.read(staged[0])
            whole = bytearray(size)
            if sum(segment.length for segment in staged) < size:
                data = await self._tools.reader.pread(self.base(), offset, size, pattern)
                whole[: len(data)] = data
            for segment in staged:
                start = segment.offset - offset
                whole[start : start + segment.length] = await self._staged.read(segment)
            return bytes(whole)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes, cursor: ErrorCursor | None = None) -> int:
        """Stage `data` at `offset`; returns how many bytes (all). No checkpoint if they are few.

        Raises FileTooLarge, StagingFull, StagingFailed (nothing is changed), BodyLost once after a lost session; and
        what `commit` does where the file is in too many pieces to be written further.
        """
        return await self._write(offset, data, cursor)

    async def append(self, data: bytes, cursor: ErrorCursor | None = None) -> int:
        """As `write`, at the end of the file as it will be: behind what others append until the commit."""
        return await self._write(None, data, cursor)

    async def _write(self, offset: int | None, data: bytes, cursor: ErrorCursor | None) -> int:
        self.errors.report(cursor)
        if len(self._staged.map) >= SEGMENTS_MAX and not self.orphaned:
            await self.commit(cursor)
        async with _held(self._writing):
            start = self.size_bytes if offset is None else offset
            if start + len(data) > FILE_BYTES_MAX:
                raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            if offset is None and self._append_from is None:
                self._append_from = start
            await self._staged.write(start, data)
            self._mtime_ns = time.time_ns()
        return len(data)

    # -- committing --------------------------------------------------------------------------------------------------

    async def commit(self, cursor: ErrorCursor | None = None) -> None:
        """On return all that was written before the call is in the store and in etcd.

        Raises BodyLost once for each handle after a lost session; BodyUnavailable, also at the deadline; BlobStoreFull;
        MetadataError. Cancelled or failed, everything stays dirty and can be tried again.
        """
        self.errors.report(cursor)
        deadline_s = self._tools.config.commit_deadline_s
        try:
            with trio.fail_after(deadline_s):
                while self.is_dirty:
                    async with self._committing:
                        if not self.is_dirty or await self._commit_locked():
                            break
        except trio.TooSlowError as exc:
            raise BodyUnavailable(f"a commit did not end within {deadline_s:g} s") from exc
        self.errors.report(cursor)

    async def _commit_locked(self) -> bool:
        """Whether all went through; False if a truncation wants to go first."""
        try:
            if self._doubt is not None:
                self.rebase(await self._tools.volume.read_body(self.ino))
            if not self.is_dirty:
                return True
            with trio.CancelScope() as self._upload_scope:
                await self._commit_snapshot()
                return True
        except StaleInode:
            self.orphan()
            return True
        finally:
            self._upload_scope = None
        return False

    async def _commit_snapshot(self) -> None:
        appended, self._append_from = self._append_from, None
        size = max(self._staged.map.end, self._grown_to)
        self._flight = Dirty(self._staged.map.segments(), self._holes, size, appended, self._mtime_ns)
        grown_to = self._grown_to
        self._staged.pin()
        try:
            committed = await self._tools.writer.commit(self)
            self._finish(self._flight, committed, grown_to)
        finally:
            if self._flight is not None:
                self._thaw(self._flight)
            if self._doubt is None:
                self._staged.unpin()

    def _thaw(self, flight: Dirty) -> None:
        """The commit has ended without success: all of it is dirty still."""
        self._flight = None
        if flight.append_from is not None:
            self._append_from = flight.append_from

    # ---- the writer's view (`writer.CommitSource`)

    def dirty(self) -> Dirty:
        assert self._flight is not None
        return self._flight

    async def read_staged(self, segment: Segment) -> bytes:
        return await self._staged.read(segment)

    @contextlib.contextmanager
    def transacting(self, change: BodyChange) -> Iterator[None]:
        """See `writer.CommitSource`."""
        self._settled = trio.Event()
        try:
            yield
        except BaseException as exc:
            if not outcome_is_known(exc) and self._flight is not None:
                self._doubt = (self._flight, change)
            raise
        finally:
            self._settled.set()
            self._settled = None
