"""FileState: an open file's body as of this moment, and the arithmetic of commits. No locks, no requests, no waiting.

The file as its readers here see it is, from below: the *base* (the newest committed body known), *holes* punched and
not yet committed, and the *staged* bytes. A commit takes a *flight* along, a snapshot of holes and staged bytes; what
comes back is the new base. `open_file.py` has the rules.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import trio

from apollofs.fs.errors import BodyLost, NoDataThere
from apollofs.fs.plan import Dirty, layout, without_holes
from apollofs.fs.segments import Segment, shifted
from apollofs.fs.staging import StagingFile
from apollofs.fs.writer import Committed
from apollofs.metadata import extents
from apollofs.metadata.errors import (
    BodyConflict,
    NamespaceError,
    SessionLost,
    StoreUnavailable,
    TooManyExtents,
)
from apollofs.metadata.fates import Fate
from apollofs.metadata.records import Body, BodyChange, Inode


def is_certain(error: BaseException) -> bool:
    """Whether nothing was committed, after a commit that failed so."""
    if isinstance(error, SessionLost):
        return not error.in_doubt
    return isinstance(error, BodyConflict | TooManyExtents | NamespaceError | StoreUnavailable)


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A transaction whose outcome is unknown. Its flight's pin is kept until it is settled."""

    flight: Dirty
    change: BodyChange


class FileState:
    """Implements `writer.CommitSource`."""

    def __init__(self, body: Body, staged: StagingFile) -> None:
        self.ino = body.inode.ino
        self.staged = staged
        self.orphaned = False
        self.dirty_since_s: float | None = None
        """By trio's clock: when the oldest uncommitted change was made."""
        self.mtime_ns = 0
        """Of the last write here, or what utimensat has set after it."""
        self._base = body
        self._view: Body | None = None
        self._holes: tuple[tuple[int, int], ...] = ()
        self._grown_to = 0
        self._append_from: int | None = None
        self._flight: Dirty | None = None
        self._flight_from = 0
        """body_version of the base when the flight took off; its plan may read from that."""
        self._doubt: _Doubt | None = None
        self.denied_hook: Callable[[BodyChange], None] = lambda _: None
        """Called with a change of unknown outcome that may have been overwritten: its blobs may be garbage by now."""
        self._transaction: trio.Event | None = None
        self._layout: tuple[int, extents.Extents] | None = None
        self._changes = 0

    # -- what it is now ----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """body_version of the base."""
        return self._base.inode.body_version

    @property
    def version_in_use(self) -> int:
        """The oldest body_version that is still read from."""
        return self.version if self._flight is None else min(self.version, self._flight_from)

    @property
    def size_bytes(self) -> int:
        return max(self._base.inode.size_bytes, self.staged.map.end, self._grown_to)

    @property
    def is_dirty(self) -> bool:
        """Whether a commit has something to do."""
        return not self.orphaned and bool(self.staged.map or self._holes or self._grown_to or self._doubt)

    @property
    def in_doubt(self) -> bool:
        return self._doubt is not None

    @property
    def doubt(self) -> object | None:
        """What is in doubt, if anything is: to be compared by identity."""
        return self._doubt

    @property
    def is_transacting(self) -> bool:
        """Whether a commit's transaction has been sent and its outcome is not known yet."""
        return self._transaction is not None

    async def wait_for_transaction(self) -> None:
        while self._transaction is not None:
            await self._transaction.wait()

    @property
    def inode(self) -> Inode:
        """The inode as processes of this mount see it: size and times with what was written here."""
        inode = self._base.inode._replace(size_bytes=self.size_bytes)
        if self.mtime_ns and self.staged.map:
            inode = inode._replace(mtime_ns=self.mtime_ns, ctime_ns=max(self.mtime_ns, inode.ctime_ns))
        return inode

    def base(self) -> Body:
        """The newest committed body known, with the pending holes cut."""
        if self._view is None:
            self._view = without_holes(self._base, self._holes)
        return self._view

    def replace_base(self, body: Body) -> None:
        """`body` is the newest committed body known; nothing is merged (`rebase` does that)."""
        self._base = body
        self._changed()

    def _changed(self) -> None:
        self._view = None
        self._layout = None
        self._changes += 1

    def layout(self) -> extents.Extents:
        """Where there is data, stored or staged."""
        version = self._changes + self.staged.map.version
        if self._layout is None or self._layout[0] != version:
            self._layout = (version, layout(self.base(), self.staged.map.segments()))
        return self._layout[1]

    def seek_data(self, offset: int) -> int:
        found = extents.next_data(self.layout(), offset) if offset >= 0 else None
        if found is None or found >= self.size_bytes:
            raise NoDataThere("no data at or after this offset")
        return found

    def seek_hole(self, offset: int) -> int:
        if not 0 <= offset < self.size_bytes:
            raise NoDataThere("the offset is not within the file")
        return min(extents.next_hole(self.layout(), offset), self.size_bytes)

    # -- changes that processes make ---------------------------------------------------------------------------------

    def note_append(self) -> int:
        """Bytes are about to be appended: where."""
        if self._append_from is None:
            self._append_from = self.size_bytes
        return self.size_bytes

    def note_dirty(self) -> None:
        """Something was written or punched."""
        self.mtime_ns = time.time_ns()
        if self.dirty_since_s is None:
            self.dirty_since_s = trio.current_time()

    def punch(self, offset: int, length: int) -> None:
        """Bytes become a hole; the size stays."""
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return
        size = self.size_bytes
        self.staged.drop(offset, offset + length)
        if self.size_bytes < size:
            self._grown_to = size
        if self._append_from is not None and self.staged.map.end <= self._append_from:
            # Nothing that was appended is left to be moved.
            self._append_from = None
        self._holes = (*self._holes, (offset, length))
        self._changed()
        self._localise()
        self.note_dirty()

    def grow(self, size: int) -> None:
        """The file is at least `size` bytes long; what is new is a hole."""
        if size > self.size_bytes:
            self._grown_to = size
            self._changed()
            self._localise()
            self.note_dirty()

    def truncated(self, size: int, inode: Inode | None, body: Body | None) -> None:
        """The file has been cut or extended to `size`: in etcd (`inode` is the reply), or only here (None).

        `body`: the newest body, if it had to be read, because others had changed it too.
        """
        self.staged.drop(size)
        self._append_from = None
        self._grown_to = 0
        self._holes = tuple((start, min(length, size - start)) for start, length in self._holes if start < size)
        if body is None:
            base = self._base
            resized = inode if inode is not None else base.inode._replace(size_bytes=size)
            kept = extents.truncate(base.inode.extents, size)
            body = Body(resized._replace(extents=kept), base.inline[:size])
        self.replace_base(body)
        if not self.is_dirty:
            self.dirty_since_s = None

    # -- what others make --------------------------------------------------------------------------------------------

    def adopt(self, inode: Inode) -> None:
        """Newer attributes; the body stays."""
        base = self._base.inode
        if inode.revision < base.revision or inode.body_version < base.body_version:
            return
        if inode.body_version == base.body_version:
            # The same body: its size too, whatever local size the caller may have put there.
            same = inode._replace(size_bytes=base.size_bytes, extents=base.extents)
            self._base = self._base._replace(inode=same)
        else:
            kept = base._replace(
                mode=inode.mode,
                nlink=inode.nlink,
                uid=inode.uid,
                gid=inode.gid,
                atime_ns=inode.atime_ns,
                mtime_ns=inode.mtime_ns,
                ctime_ns=inode.ctime_ns,
            )
            self._base = self._base._replace(inode=kept)
        self._changed()

    def rebase(self, body: Body, fate: Fate | None = None) -> None:
        """Replace the base by a newer body; what was appended here moves behind what was appended there.

        Settles what is in doubt: `fate` is what became of it (None: only `body` can tell), and `body` was read when no
        late copy of it could arrive any more. Not while a transaction is under way: its outcome may be in `body`
        already.
        """
        if self.orphaned or body.inode.body_version < self.version:
            return
        if self._doubt is not None and self._settle(self._doubt, body, fate):
            return
        old_size, new_size = self._base.inode.size_bytes, body.inode.size_bytes
        start = self._append_start()
        self.replace_base(body)
        if start is not None and new_size > start:
            self._move_appended(start, new_size - start)
        elif start is not None and start == old_size:
            # Cut elsewhere: what was appended follows the end, but not into what was written at a fixed place.
            grown_to = self._grown_to if self._grown_to <= start else 0
            self._move_appended(start, max(new_size, self.staged.map.end_before(start), grown_to) - start)

    def _append_start(self) -> int | None:
        """From where on dirty bytes were appended, those of a flight too."""
        if self._flight is not None and self._flight.append_from is not None:
            return self._flight.append_from
        return self._append_from

    def _move_appended(self, start: int, distance: int) -> None:
        if not distance:
            return
        self.staged.shift(start, distance)
        if self._grown_to > start:
            self._grown_to += distance
        if self._append_from is not None:
            self._append_from += distance
        flight = self._flight
        if flight is not None:
            self._flight = replace(
                flight,
                segments=shifted(flight.segments, start, distance),
                size_at_least=flight.size_at_least + (distance if flight.size_at_least > start else 0),
                append_from=None if flight.append_from is None else flight.append_from + distance,
            )

    def orphan(self) -> None:
        """The file has no name any more: from now on everything stays here."""
        if self.orphaned:
            return
        self._drop_doubt()
        self.orphaned = True
        self._append_from = None
        self._localise()

    def _localise(self) -> None:
        """Of an orphan, the base is ours to change."""
        if not self.orphaned:
            return
        size = self.size_bytes
        base = self.base()
        self._holes = ()
        self._grown_to = 0
        self.replace_base(base._replace(inode=base.inode._replace(size_bytes=size)))

    def lose(self) -> bool:
        """The session is lost: drop what is not committed. Whether anything was."""
        if self.orphaned or not (self.is_dirty or self._flight is not None):
            return False
        self._drop_doubt()
        self.staged.clear()
        self._holes, self._grown_to, self._append_from, self._flight = (), 0, None, None
        self.dirty_since_s = None
        self._changed()
        return True

    # -- flights -----------------------------------------------------------------------------------------------------

    def take_off(self) -> None:
        """Snapshot what is dirty for a commit. `land` or `abort` must follow."""
        assert self._flight is None and self._doubt is None
        size = max(self.staged.map.end, self._grown_to)
        self._flight = Dirty(self.staged.map.segments(), self._holes, size, self._append_from, self.mtime_ns)
        self._append_from = None
        self._flight_from = self.version
        self.staged.pin()

    def land(self, committed: Committed) -> None:
        """The flight is committed."""
        flight, self._flight = self._flight, None
        if flight is None:
            # The session was lost meanwhile, and what was dirty dropped. The next refresh tells how it is.
            self.staged.unpin()
            return
        start, distance = committed.change.append_from, committed.distance
        self._land(flight, start, distance, committed.body)

    def abort(self) -> None:
        """The flight has failed: all of it is dirty still. In doubt, its pin is kept."""
        flight, self._flight = self._flight, None
        if flight is not None and flight.append_from is not None:
            self._append_from = flight.append_from
        if self._doubt is None:
            self.staged.unpin()

    def _land(self, flight: Dirty, start: int | None, distance: int, body: Body) -> None:
        self.staged.forget(flight.segments)
        if start is not None and distance:
            self.staged.shift(start, distance)
        self._holes = self._holes[len(flight.holes) :]
        if self._grown_to <= flight.size_at_least:
            self._grown_to = 0
        self.replace_base(body)
        if self._append_from is not None:
            self._land_appended(self._append_from + distance, flight.size_at_least + distance)
        self.dirty_since_s = trio.current_time() if self.is_dirty else None
        self.staged.unpin()

    def _land_appended(self, start: int, reached: int) -> None:
        """What was appended since the flight lies behind it, and behind what others have appended."""
        self._append_from = max(start, reached)
        if self.staged.map.end <= self._append_from:
            self._append_from = None
        else:
            self._move_appended(self._append_from, max(0, self._base.inode.size_bytes - self._append_from))

    def _settle(self, doubt: _Doubt, body: Body, fate: Fate | None) -> bool:
        """Whether the doubtful transaction was applied; if so it has landed."""
        if fate is None:
            distance = _distance_if_applied(body, doubt.change)
        else:
            distance = fate.size_bytes - doubt.change.size_at_least if fate.applied else None
            if distance is not None and doubt.change.append_from is None:
                distance = 0
        self._doubt = None
        if distance is None:
            self.staged.unpin()
            if fate is None and body.inode.body_version > doubt.change.base_version:
                self.denied_hook(doubt.change)
            return False
        self._land(doubt.flight, doubt.change.append_from, distance, body)
        start = self._append_from
        if fate is not None and start is not None and body.inode.size_bytes < fate.size_bytes:
            # cut elsewhere since: what was appended after it follows the end
            self._move_appended(start, max(body.inode.size_bytes, self.staged.map.end_before(start)) - start)
        return True

    def _drop_doubt(self) -> None:
        if self._doubt is not None:
            self._doubt = None
            self.staged.unpin()

    # ---- the writer's view (`writer.CommitSource`)

    def dirty(self) -> Dirty:
        if self._flight is None:
            raise BodyLost("the session was lost while this was being stored")
        # A time that was set since the snapshot counts: a commit must not undo a utimensat.
        return replace(self._flight, mtime_ns=self.mtime_ns)

    async def read_staged(self, segment: Segment) -> bytes:
        return await self.staged.read(segment)

    @contextlib.contextmanager
    def transacting(self, change: BodyChange) -> Iterator[None]:
        """See `writer.CommitSource`."""
        self._transaction = trio.Event()
        try:
            yield
        except BaseException as exc:
            if self._flight is not None and not is_certain(exc):
                self._doubt = _Doubt(self._flight, change)
            raise
        finally:
            self._transaction.set()
            self._transaction = None


def _distance_if_applied(body: Body, change: BodyChange) -> int | None:
    """How far a change has moved what it appended, if `body`, which was read after it, shows that it was applied.

    None if it was not. A change that others have wholly overwritten since looks as if it never was; repeating it then
    is what a slower network would have done too.
    """
    if change.inline is not None:
        # Without bytes there is nothing to recognise, and nothing that a second commit could do twice.
        shown = bool(change.inline) and body.inode.is_inline and body.inline.startswith(change.inline)
        return 0 if shown and body.inode.body_version > change.base_version else None
    applied = False
    for laid in change.extents:
        for found in body.inode.extents:
            start = max(laid.blob_offset, found.blob_offset)
            end = min(laid.blob_offset + laid.length, found.blob_offset + found.length)
            if found.blob != laid.blob or start >= end:
                continue
            applied = True
            if change.append_from is not None and laid.offset >= change.append_from:
                return (found.offset - found.blob_offset) - (laid.offset - laid.blob_offset)
    return 0 if applied else None
