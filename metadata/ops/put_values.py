"""Put: values under names, each replaced as a whole, and several at once or none.

A value that is replaced is a new file that takes the name, as with rename: who has the old one open or mapped reads it
undivided to its end, however many calls that takes, and what is still written to it is not mixed into the new value.
(In place, a loop of read calls would get the head of one value and the tail of another.) A value that only etcd holds
goes when it is replaced, and is not kept in the trash: keys that change many times a second would fill it. The new one
takes its place in `v/` under the old number (`Inode.inline_at`), so that whoever has seen the name before knows where
to ask for the value in the same request as for the name. A very small value is also kept in the inode.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from apollofs.metadata import codec
from apollofs.metadata.errors import InvalidArgument, IsADirectory, RevisionConflict
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.body import BodyKeys
from apollofs.metadata.ops.common import Home, Location, Scope, check_may_add, check_may_remove, inherited_gid
from apollofs.metadata.records import Extent, Inode, Owner, Usage, without_suid
from apollofs.metadata.store import Delete, Put, RangeResult, prefix_end
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

ABSENT = 0
"""In `ValueWrite.expected`: there must be none."""
VALUES_MAX = 16
"""Values of one transaction: with everything that belongs to them it stays below etcd's 128 operations."""


@dataclass(frozen=True, slots=True)
class NewBody:
    """A value as it is to be: `inline` (whole, for etcd), or extents over what was uploaded."""

    ino: int
    """A number that was never used, of the new file."""
    size_bytes: int
    inline: bytes | None
    extents: tuple[Extent, ...]
    mode: int
    """Permission bits, if there was no file; one that is replaced hands on its own, and its owner."""
    owner: Owner


@dataclass(frozen=True, slots=True)
class ValueWrite:
    """One value of a put: its new body, or its removal, or neither: then it is only compared.

    `expected`: the revision that it must have, ABSENT, or None for any.
    """

    location: Location
    expected: int | None = None
    body: NewBody | None = None
    remove: bool = False


@dataclass(slots=True)
class _Draft:
    """What the values that were decided so far amount to."""

    writes: list[Put | Delete] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    bytes: int = 0
    inodes: int = 0
    after: list[Inode | None] = field(default_factory=list)
    named: dict[int, None] = field(default_factory=dict)
    """Directories whose names change."""
    relied: dict[int, None] = field(default_factory=dict)
    """Directories of which something is only compared."""
    seen: set[int] = field(default_factory=set)

    def take(self, inode: Inode) -> None:
        """Each file once: what becomes of it is decided on how it was before. Raises InvalidArgument."""
        if inode.ino in self.seen:
            raise InvalidArgument("two of the keys are names of one file, or the same key twice")
        self.seen.add(inode.ino)


@dataclass(frozen=True, slots=True)
class PutValues:
    """Replies the inodes as they are after, None for what is not there, and the revision.

    Raises RevisionConflict, NoSuchEntry (the directory has been removed), IsADirectory, InvalidArgument (the name means
    something else than a regular file), OperationNotPermitted (immutable or append-only).
    """

    scope: Scope
    values: Sequence[ValueWrite]

    def decide(self, view: View) -> Decision[tuple[int, list[Inode | None]]]:
        draft = _Draft()
        for value in self.values:
            self._decide(view, value, draft)
        if draft.writes:
            # what another mount has answered ahead of the store counts too: a write (of nothing) has it committed
            relied = [parent for parent in draft.relied if parent not in draft.named]
            draft.writes += [Delete(self.scope.keys.dentry(parent, b"")) for parent in relied]
            draft.writes += [self.scope.touch(parent) for parent in draft.named]
        first, *further = draft.changes or [Change(Kind.NOTHING)]

        def reply(revision: int, _: Sequence[RangeResult]) -> tuple[int, list[Inode | None]]:
            return revision, [each._replace(revision=revision) if each is not None else None for each in draft.after]

        return Decision(
            reply,
            draft.writes,
            first,
            usage=Usage(draft.bytes, draft.inodes),
            further=tuple(further),
            rests_elsewhere=True,
        )

    def _decide(self, view: View, value: ValueWrite, draft: _Draft) -> None:
        location = value.location
        likely_absent = value.expected == ABSENT or (value.expected is None and not value.remove)
        dentry = self.scope.dentry(view, *location, likely_absent=likely_absent)
        home = self.scope.home_of(view, location, dentry) if dentry is not None else None
        found = home.inode.revision if home is not None else ABSENT
        if value.expected is not None and found != value.expected:
            raise RevisionConflict(location[1], found)
        if home is not None and not home.inode.is_file:
            if home.inode.is_dir:
                raise IsADirectory("a directory is no value")
            raise InvalidArgument("what is no regular file is no value")
        if home is not None:
            draft.take(home.inode)
        if value.body is not None:
            self._replace(view, home, value, value.body, draft)
        elif value.remove and home is not None:
            self._remove(view, home, value, draft)
        else:
            draft.relied[location[0]] = None
            draft.after.append(home.inode if home is not None else None)

    def _replace(self, view: View, home: Home | None, value: ValueWrite, body: NewBody, draft: _Draft) -> None:
        """A new file under a name that was free, or meant another one."""
        parent, name = value.location
        directory = self.scope.directory(view, parent)
        if home is None:
            check_may_add(directory)
        else:
            check_may_remove(directory, home.inode)
            self._discard(home, value.location, draft, stays=bool(body.inline))
        inode = self._inode(directory, home, body)
        writes: list[Put | Delete] = []
        if body.inline is not None:
            inode, writes = BodyKeys(self.scope, value.location).store_inline(inode, inode, body.inline)
        else:
            inode = inode._replace(extents=body.extents)
        draft.writes += [*writes, Put(self.scope.keys.dentry(parent, name), codec.encode_embedded(inode))]
        draft.changes += self._created(inode, value.location)
        draft.bytes += inode.allocated_bytes
        draft.inodes += 1
        draft.after.append(inode)
        draft.named[parent] = None

    def _inode(self, directory: Inode, home: Home | None, body: NewBody) -> Inode:
        now_ns = self.scope.now_ns
        replaced = home.inode if home is not None else None
        inline_at = 0
        if replaced is not None and body.inline and replaced.is_inline and _goes_at_once(replaced):
            inline_at = replaced.inline_number
        return Inode(
            ino=body.ino,
            mode=without_suid(replaced.mode) if replaced else stat.S_IFREG | stat.S_IMODE(body.mode),
            nlink=1,
            uid=replaced.uid if replaced else body.owner.uid,
            gid=replaced.gid if replaced else inherited_gid(directory, body.owner.gid),
            size_bytes=body.size_bytes,
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            btime_ns=now_ns,
            body_version=1,
            policy=directory.policy,
            inline_at=inline_at,
        )

    def _remove(self, view: View, home: Home, value: ValueWrite, draft: _Draft) -> None:
        check_may_remove(self.scope.directory(view, value.location[0]), home.inode)
        self._drop(home, value.location, draft)
        draft.writes.append(Delete(self.scope.keys.dentry(*value.location)))
        draft.after.append(None)
        draft.named[value.location[0]] = None

    def _discard(self, home: Home, location: Location, draft: _Draft, *, stays: bool) -> None:
        """A value is replaced: one that only etcd holds goes at once. With `stays` the new one overwrites its bytes."""
        inode = home.inode
        if not _goes_at_once(inode):
            self._drop(home, location, draft)
            return
        keys = self.scope.keys
        draft.writes.append(Delete(keys.inode(inode.ino) if home.location is None else keys.moved(inode.ino)))
        if inode.is_inline and not stays:
            draft.writes.append(Delete(keys.inline(inode.inline_number)))
        if inode.xattrs:
            attributes = keys.xattrs_of(inode.ino)
            draft.writes.append(Delete(attributes, prefix_end(attributes)))
        self._unlinked(inode._replace(nlink=0), location, draft)

    def _drop(self, home: Home, location: Location, draft: _Draft) -> None:
        """The name is taken away from the file that it meant; what becomes of the dentry is the caller's."""
        inode, writes = self.scope.drop_name(home, location)
        draft.writes += writes
        self._unlinked(inode, location, draft)

    def _unlinked(self, inode: Inode, location: Location, draft: _Draft) -> None:
        draft.changes.append(
            Change(Kind.UNLINK, inode.ino, *location, self.scope.now_ns, inode.mode, inode.size_bytes, inode.nlink)
        )
        if inode.nlink == 0:
            draft.bytes -= inode.allocated_bytes
            draft.inodes -= 1

    def _created(self, inode: Inode, location: Location) -> list[Change]:
        """As of a file that is made empty, and then written."""
        now_ns = self.scope.now_ns
        made = Change(Kind.CREATE, inode.ino, *location, now_ns, inode.mode, uid=inode.uid, gid=inode.gid)
        return [made, self.scope.change(Kind.COMMIT, Home(inode, location))]


def _goes_at_once(replaced: Inode) -> bool:
    """Whether only etcd holds a value that is replaced, and only under this name."""
    return replaced.nlink == 1 and not replaced.extents and not replaced.extent_pages
