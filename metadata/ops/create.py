"""Create: a regular file, node, symlink or directory under a name that does not exist yet."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import EntryExists
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Scope, check_may_add, inherited_gid, revised
from apollofs.metadata.records import Inode, Owner, Usage
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class Create:
    """Preconditions: the parent is as known (it exists, and what is inherited from it), the name does not exist."""

    scope: Scope
    ino: int
    parent: int
    name: bytes
    mode: int
    owner: Owner
    rdev: int = 0
    target: bytes = b""

    def decide(self, view: View) -> Decision[Inode]:
        directory = self.scope.directory(view, self.parent)
        if self.scope.dentry(view, self.parent, self.name, likely_absent=True) is not None:
            raise EntryExists("the name exists")
        check_may_add(directory)
        inode = self._inode(directory)
        is_dir = inode.is_dir
        writes = self._directory(inode) if is_dir else [self._file(inode)]
        writes.append(self.scope.touch(self.parent))
        kind = Kind.MKDIR if is_dir else Kind.CREATE
        change = Change(
            kind,
            inode.ino,
            self.parent,
            self.name,
            self.scope.now_ns,
            inode.mode,
            inode.size_bytes,
            uid=inode.uid,
            gid=inode.gid,
            rdev=inode.rdev,
            value=inode.target,
        )
        return Decision(
            lambda revision, _: revised(inode, revision), writes, change, usage=Usage(0, 1), born=inode.ino * is_dir
        )

    def _inode(self, directory: Inode) -> Inode:
        now_ns = self.scope.now_ns
        is_dir = stat.S_ISDIR(self.mode)
        inherits_setgid = is_dir and bool(directory.mode & stat.S_ISGID)
        return Inode(
            ino=self.ino,
            mode=self.mode | (stat.S_ISGID if inherits_setgid else 0),
            nlink=2 if is_dir else 1,
            uid=self.owner.uid,
            gid=inherited_gid(directory, self.owner.gid),
            size_bytes=len(self.target),
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            btime_ns=now_ns,
            rdev=self.rdev,
            target=self.target,
            parent=self.parent if is_dir else 0,
            name=self.name if is_dir else b"",
            policy=directory.policy if is_dir or stat.S_ISREG(self.mode) else 0,
        )

    def _file(self, inode: Inode) -> Put | Delete:
        return Put(self.scope.keys.dentry(self.parent, self.name), codec.encode_embedded(inode))

    def _directory(self, inode: Inode) -> list[Put | Delete]:
        keys = self.scope.keys
        return [
            Put(keys.dentry(self.parent, self.name), codec.encode_reference(inode.ino, stat.S_IFDIR)),
            Put(keys.inode(inode.ino), codec.encode_inode(inode)),
            self.scope.touch(inode.ino),
            Put(keys.child(self.parent, inode.ino), b""),
        ]
