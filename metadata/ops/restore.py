"""Restore: give an unlinked file a name again, out of its tombstone. What it had is all still there until then."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import EntryExists, NoSuchEntry
from apollofs.metadata.journal import Kind
from apollofs.metadata.ops.common import Home, Scope, check_may_add, revised
from apollofs.metadata.records import Inode, Usage
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class Restore:
    """Replies the inode. NoSuchEntry where the tombstone is gone, or the collector has begun with it; EntryExists.

    No mount may have the inode open: it would go on with what it wrote to it alone.
    """

    scope: Scope
    tombstone: bytes
    """Its key."""
    parent: int
    name: bytes

    def decide(self, view: View) -> Decision[Inode]:
        kv = view.get(self.tombstone)
        stone = codec.decode_tombstone(kv.value, kv.mod_revision) if kv is not None else None
        if stone is None or stone.inode is None or stone.condemned:
            raise NoSuchEntry("it is not in the trash any more")
        check_may_add(self.scope.directory(view, self.parent))
        if self.scope.dentry(view, self.parent, self.name, likely_absent=True) is not None:
            raise EntryExists("the name exists")
        inode = stone.inode._replace(nlink=1, ctime_ns=self.scope.now_ns)
        writes: list[Put | Delete] = [
            Delete(self.tombstone),
            Put(self.scope.keys.dentry(self.parent, self.name), codec.encode_embedded(inode)),
            self.scope.touch(self.parent),
        ]
        change = self.scope.change(Kind.RESTORE, Home(inode, (self.parent, self.name)))
        usage = Usage(inode.allocated_bytes if inode.is_file else 0, 1)
        return Decision(lambda revision, _: revised(inode, revision), writes, change, usage=usage)
