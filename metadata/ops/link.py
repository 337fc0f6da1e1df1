"""Link: one more name for a file. The second one moves the inode from its dentry to a key of its own."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import EntryExists, OperationNotPermitted, TooManyLinks
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Location, Scope, check_may_add, check_unsealed, revised
from apollofs.metadata.records import LINKS_MAX, Inode, InodeFlag
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class Link:
    scope: Scope
    ino: int
    location: Location | None
    parent: int
    name: bytes

    def decide(self, view: View) -> Decision[Inode]:
        keys = self.scope.keys
        home = self.scope.find(view, self.ino, self.location)
        directory = self.scope.directory(view, self.parent)
        if self.scope.dentry(view, self.parent, self.name, likely_absent=True) is not None:
            raise EntryExists("the name exists")
        self._check(home.inode, directory)
        inode = home.inode._replace(nlink=home.inode.nlink + 1, ctime_ns=self.scope.now_ns)
        reference = codec.encode_reference(inode.ino, inode.mode & 0o170000)
        writes: list[Put | Delete] = [
            Put(keys.inode(inode.ino), codec.encode_inode(inode)),
            Put(keys.dentry(self.parent, self.name), reference),
            self.scope.touch(self.parent),
        ]
        if home.location is not None:
            writes += [Put(keys.dentry(*home.location), reference), Delete(keys.moved(inode.ino))]
        change = Change(Kind.LINK, inode.ino, self.parent, self.name, self.scope.now_ns, inode.mode, nlink=inode.nlink)
        return Decision(lambda revision, _: revised(inode, revision), writes, change)

    @staticmethod
    def _check(inode: Inode, directory: Inode) -> None:
        if inode.is_dir:
            raise OperationNotPermitted("a directory has one name")
        check_unsealed(inode)
        if inode.flags & (InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY):
            raise OperationNotPermitted("the inode is immutable or append-only")
        check_may_add(directory)
        if inode.nlink >= LINKS_MAX:
            raise TooManyLinks(f"an inode has at most {LINKS_MAX} names")
