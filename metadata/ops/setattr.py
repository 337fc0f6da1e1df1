"""Setattr: mode, owner, times, flags and size of an inode."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from apollofs.metadata import codec, extents
from apollofs.metadata.codec import Times
from apollofs.metadata.errors import FileTooLarge, HoldsSealed, InvalidArgument, IsADirectory, OperationNotPermitted
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.body import BodyKeys
from apollofs.metadata.ops.common import Home, Location, Scope, check_unsealed
from apollofs.metadata.ops.inspect import directory_questions, with_answers
from apollofs.metadata.records import (
    FILE_BYTES_MAX,
    NOW,
    Inode,
    InodeFlag,
    SetAttr,
    Usage,
    storable_time,
    without_suid,
)
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

GUARDS = InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """Replies the inode as it is after. A directory's times are in `t/<dir>`, written blindly."""

    scope: Scope
    ino: int
    location: Location | None
    attr: SetAttr

    def decide(self, view: View) -> Decision[Inode]:
        home = self.scope.find(view, self.ino, self.location)
        before = home.inode
        self._check(before)
        inode = self._apply(before)
        writes: list[Put | Delete] = []
        if self.attr.size_bytes is not None:
            inode, writes = self._resize(view, Home(inode, home.location), self.attr.size_bytes)
        writes.append(self.scope.store(Home(inode, home.location), inode))
        change = self._change(Home(inode, home.location))
        usage = Usage(inode.allocated_bytes - before.allocated_bytes if inode.is_file else 0, 0)
        if not inode.is_dir:
            return Decision(lambda revision, _: inode._replace(revision=revision), writes, change, usage=usage)
        if self.attr.mtime_ns is not None:
            times = Times(self._time(self.attr.mtime_ns), self.scope.now_ns)
            writes.append(Put(self.scope.keys.times(inode.ino), codec.encode_times(times)))
        return Decision(
            lambda revision, found: with_answers(inode._replace(revision=revision), *found),
            writes,
            change,
            directory_questions(self.scope.keys, inode.ino),
        )

    def _change(self, home: Home) -> Change:
        attr, now_ns = self.attr, self.scope.now_ns
        resized = attr.size_bytes is not None
        return self.scope.change(
            Kind.SETATTR,
            home,
            mtime_offset_ns=home.inode.mtime_ns - now_ns if resized or attr.mtime_ns is not None else None,
            atime_offset_ns=home.inode.atime_ns - now_ns if attr.atime_ns is not None else None,
        )

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check(self, inode: Inode) -> None:
        attr = self.attr
        if attr.size_bytes is not None:
            if inode.is_dir:
                raise IsADirectory("a directory has no size to set")
            if not inode.is_file:
                raise InvalidArgument("only a regular file has a size to set")
            if attr.size_bytes > FILE_BYTES_MAX:
                raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            if attr.size_bytes < 0:
                raise InvalidArgument("a negative size")
        check_unsealed(inode)
        if inode.flags & InodeFlag.WAYPOINT and (attr.mode, attr.uid, attr.gid, attr.flags) != (None,) * 4:
            raise HoldsSealed("a sealed tree lies below the directory")
        if inode.flags & GUARDS and attr.flags is None and not self._only_times_now():
            raise OperationNotPermitted("the inode is immutable or append-only")
        if inode.flags & InodeFlag.IMMUTABLE and attr.flags is None:
            raise OperationNotPermitted("the inode is immutable")

    def _only_times_now(self) -> bool:
        """Setting the times to now is what a write does, and so allowed on an append-only file."""
        attr = self.attr
        others = (attr.mode, attr.uid, attr.gid, attr.size_bytes, attr.ctime_ns)
        return all(value is None for value in others) and {attr.atime_ns, attr.mtime_ns} <= {None, NOW}

    # -- the new inode -----------------------------------------------------------------------------------------------

    def _time(self, time_ns: int) -> int:
        return self.scope.now_ns if time_ns == NOW else storable_time(time_ns)

    def _apply(self, inode: Inode) -> Inode:
        attr = self.attr
        mode = inode.mode
        if attr.mode is not None:
            mode = stat.S_IFMT(mode) | stat.S_IMODE(attr.mode)
        if attr.clear_suid and inode.is_file:
            mode = without_suid(mode)
        flags = inode.flags
        if attr.flags is not None:
            flags = (flags & ~GUARDS) | (attr.flags & GUARDS)
        return inode._replace(
            mode=mode,
            uid=inode.uid if attr.uid is None else attr.uid,
            gid=inode.gid if attr.gid is None else attr.gid,
            atime_ns=inode.atime_ns if attr.atime_ns is None else self._time(attr.atime_ns),
            mtime_ns=inode.mtime_ns if attr.mtime_ns is None else self._time(attr.mtime_ns),
            ctime_ns=self.scope.now_ns,
            flags=flags,
        )

    def _resize(self, view: View, home: Home, size_bytes: int) -> tuple[Inode, list[Put | Delete]]:
        inode = home.inode
        body = BodyKeys(self.scope, home.location)
        before = body.load(view, inode)
        mtime_ns = inode.mtime_ns if self.attr.mtime_ns is not None else self.scope.now_ns
        after = inode._replace(size_bytes=size_bytes, mtime_ns=mtime_ns, body_version=inode.body_version + 1)
        if inode.is_inline:
            return body.resize_inline(view, after)
        kept = extents.truncate(before.extents, size_bytes)
        return body.store(before, after._replace(extents=kept))
