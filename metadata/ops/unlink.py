"""Unlink: take away a name of a file. The last one moves the inode to a tombstone, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.errors import IsADirectory
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Scope, check_may_remove, revised
from apollofs.metadata.records import Inode, Usage
from apollofs.metadata.store import Delete
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class Unlink:
    """Replies the inode as it is after; with nlink 0 it still has its extents, for who has it open."""

    scope: Scope
    parent: int
    name: bytes

    def decide(self, view: View) -> Decision[Inode]:
        location = (self.parent, self.name)
        directory, home = self.scope.named(view, location)
        if home.inode.is_dir:
            raise IsADirectory("a directory is removed by rmdir")
        check_may_remove(directory, home.inode)
        inode, writes = self.scope.drop_name(home, location)
        writes += [Delete(self.scope.keys.dentry(*location)), self.scope.touch(self.parent)]
        change = Change(Kind.UNLINK, inode.ino, *location, self.scope.now_ns, inode.mode, inode.size_bytes, inode.nlink)
        usage = Usage(-inode.allocated_bytes, -1) if inode.nlink == 0 else Usage(0, 0)
        return Decision(lambda revision, _: revised(inode, revision), writes, change, usage=usage)
