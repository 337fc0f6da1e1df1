"""Rmdir: remove an empty directory."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.errors import DirectoryNotEmpty, NotADirectory
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Scope, check_may_remove, revised
from apollofs.metadata.records import Inode, Usage
from apollofs.metadata.store import Delete
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class Rmdir:
    """Removes `i/<ino>`, so a create in the directory that comes later fails; one that came before fails this."""

    scope: Scope
    parent: int
    name: bytes

    def decide(self, view: View) -> Decision[Inode]:
        location = (self.parent, self.name)
        directory, home = self.scope.named(view, location)
        if not home.inode.is_dir:
            raise NotADirectory("not a directory")
        if not view.is_empty(self.scope.keys.dentries_of(home.inode.ino)):
            raise DirectoryNotEmpty("the directory is not empty")
        check_may_remove(directory, home.inode)
        inode = home.inode._replace(nlink=0, ctime_ns=self.scope.now_ns)
        writes = self.scope.drop_directory(home.inode)
        writes += [Delete(self.scope.keys.dentry(*location)), self.scope.touch(self.parent)]
        change = Change(Kind.RMDIR, inode.ino, *location, self.scope.now_ns, inode.mode)
        return Decision(lambda revision, _: revised(inode, revision), writes, change, usage=Usage(0, -1))
