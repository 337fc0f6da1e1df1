"""Rename: move a name, replace what the new name meant, or exchange two names; one transaction whatever it moves.

A directory that gets another parent must not become its own ancestor, on any mount. All such moves are in one line:
each compares and puts the volume's `dirmove` key. While that key is as it was, every directory's parent is as it was,
so the ancestors may be looked up at leisure, if only after the key.
"""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import (
    DirectoryNotEmpty,
    EntryExists,
    InvalidArgument,
    IsADirectory,
    NoSuchEntry,
    NotADirectory,
)
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Home, Location, Scope, check_may_add, check_may_remove, revised
from apollofs.metadata.records import ROOT_INO, Inode, Renamed, RenameFlag, Usage
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

DEPTH_MAX = 4096
Writes = list[Put | Delete]


@dataclass(frozen=True, slots=True)
class Rename:
    scope: Scope
    source: Location
    target: Location
    flags: RenameFlag

    def decide(self, view: View) -> Decision[Renamed]:
        source_directory = self.scope.directory(view, self.source[0])
        target_directory = self.scope.directory(view, self.target[0])
        moving = self._home(view, self.source)
        if moving is None:
            raise NoSuchEntry("no such name")
        standing = self._home(view, self.target)
        if standing is not None and self.flags & RenameFlag.NOREPLACE:
            raise EntryExists("the new name exists")
        if standing is None and self.flags & RenameFlag.EXCHANGE:
            raise NoSuchEntry("the name to exchange with does not exist")
        if standing is not None and standing.inode.ino == moving.inode.ino:
            # both names are the same file already: POSIX says that nothing happens
            return Decision(lambda _, __: Renamed(moving.inode, standing.inode))
        check_may_remove(source_directory, moving.inode)
        if standing is None:
            check_may_add(target_directory)
        else:
            check_may_remove(target_directory, standing.inode)
        if self.flags & RenameFlag.EXCHANGE:
            assert standing is not None
            return self._exchange(view, moving, standing)
        return self._move(view, moving, standing)

    def _home(self, view: View, location: Location) -> Home | None:
        dentry = self.scope.dentry(view, *location, likely_absent=location == self.target)
        return self.scope.home_of(view, location, dentry) if dentry is not None else None

    # -- the three forms ---------------------------------------------------------------------------------------------

    def _move(self, view: View, moving: Home, standing: Home | None) -> Decision[Renamed]:
        replaced: Inode | None = None
        writes: Writes = []
        usage = Usage(0, 0)
        if standing is not None:
            self._check_replace(view, moving.inode, standing.inode)
            replaced, writes = self._replace(standing)
            if replaced.nlink == 0:
                usage = Usage(-replaced.allocated_bytes if replaced.is_file else 0, -1)
        self._check_tree(view, moving.inode, self.source, self.target)
        moved, moves = self._place(moving, self.source, self.target)
        writes += [*moves, Delete(self.scope.keys.dentry(*self.source)), *self._touch_parents()]
        writes += self._dirmove(moving.inode)
        change = self._change(Kind.RENAME, moved, replaced)
        return Decision(lambda revision, _: Renamed(revised(moved, revision), replaced), writes, change, usage=usage)

    def _exchange(self, view: View, moving: Home, standing: Home) -> Decision[Renamed]:
        self._check_tree(view, moving.inode, self.source, self.target)
        self._check_tree(view, standing.inode, self.target, self.source)
        moved, writes = self._place(moving, self.source, self.target)
        other, more = self._place(standing, self.target, self.source)
        writes += [*more, *self._touch_parents()]
        writes += self._dirmove(moving.inode) or self._dirmove(standing.inode)
        change = self._change(Kind.EXCHANGE, moved, other)
        return Decision(lambda revision, _: Renamed(revised(moved, revision), revised(other, revision)), writes, change)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_replace(self, view: View, moving: Inode, standing: Inode) -> None:
        if standing.is_dir and not moving.is_dir:
            raise IsADirectory("the new name is a directory")
        if moving.is_dir and not standing.is_dir:
            raise NotADirectory("the new name is not a directory")
        if not standing.is_dir:
            return
        # what moves may be in it: then it is not empty, whatever is remembered of it
        if standing.ino == self.source[0] or not view.is_empty(self.scope.keys.dentries_of(standing.ino)):
            raise DirectoryNotEmpty("the directory to be replaced is not empty")

    def _check_tree(self, view: View, inode: Inode, source: Location, target: Location) -> None:
        """A directory may not move below itself."""
        if not inode.is_dir or source[0] == target[0]:
            return
        moves = view.get(self.scope.keys.dirmove, likely_absent=False)
        since = moves.mod_revision if moves is not None else 0
        ancestor = target[0]
        for _ in range(DEPTH_MAX):
            if ancestor == inode.ino:
                raise InvalidArgument("a directory can't be moved into itself")
            if ancestor == ROOT_INO:
                return
            kv = view.get_since(self.scope.keys.inode(ancestor), since)
            if kv is None:
                raise NoSuchEntry("the directory has been removed")
            ancestor = codec.decode_inode(kv.value, kv.mod_revision).parent
        raise InvalidArgument("the directory is too deep")

    # -- writes ------------------------------------------------------------------------------------------------------

    def _place(self, home: Home, source: Location, target: Location) -> tuple[Inode, Writes]:
        """Everything that makes `target` mean the inode, but for the dentry at `source`."""
        keys = self.scope.keys
        inode = home.inode._replace(ctime_ns=self.scope.now_ns)
        dentry = keys.dentry(*target)
        if home.location is not None:
            location = codec.encode_location(*target)
            return inode, [Put(dentry, codec.encode_embedded(inode)), Put(keys.moved(inode.ino), location)]
        writes: Writes = [Put(dentry, codec.encode_reference(inode.ino, inode.mode & 0o170000))]
        if inode.is_dir:
            inode = inode._replace(parent=target[0], name=target[1])
            if source[0] != target[0]:
                writes += [Delete(keys.child(source[0], inode.ino)), Put(keys.child(target[0], inode.ino), b"")]
        return inode, [*writes, Put(keys.inode(inode.ino), codec.encode_inode(inode))]

    def _replace(self, standing: Home) -> tuple[Inode, Writes]:
        """What becomes of the inode whose name is taken; its dentry is overwritten."""
        if standing.inode.is_dir:
            gone = standing.inode._replace(nlink=0, ctime_ns=self.scope.now_ns)
            return gone, self.scope.drop_directory(standing.inode)
        return self.scope.drop_name(standing, self.target)

    def _dirmove(self, inode: Inode) -> Writes:
        if not inode.is_dir or self.source[0] == self.target[0]:
            return []
        return [Put(self.scope.keys.dirmove, codec.encode_counter(self.scope.now_ns))]

    def _touch_parents(self) -> Writes:
        return [self.scope.touch(parent) for parent in dict.fromkeys((self.source[0], self.target[0]))]

    def _change(self, kind: Kind, moved: Inode, other: Inode | None) -> Change:
        return Change(
            kind,
            moved.ino,
            *self.target,
            self.scope.now_ns,
            moved.mode,
            moved.size_bytes,
            old_parent=self.source[0],
            old_name=self.source[1],
            ino2=other.ino if other is not None else 0,
            nlink2=other.nlink if other is not None else 0,
        )
