"""What several operations share: finding inodes in a view, checks, and the writes that belong together.

Where an inode is: a file with one name is embedded in its dentry; a directory, and a file that has or had several
names, is in `i/<ino>`. A `Home` says which, so that an operation can write the record back where it came from.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.codec import Dentry, Times, Tombstone
from apollofs.metadata.errors import (
    CorruptRecord,
    HoldsSealed,
    InvalidArgument,
    NameTooLong,
    NoSuchEntry,
    NotADirectory,
    OperationNotPermitted,
    Sealed,
    StaleInode,
)
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import NAME_BYTES_MAX, Inode, InodeFlag
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Moment
from apollofs.metadata.view import View

Location = tuple[int, bytes]
"""(parent, name) where a file was last seen."""
MOVES_MAX = 64
"""How many renames of a file one lookup by number follows."""


@dataclass(frozen=True, slots=True)
class Home:
    """An inode and the key that holds it; `location` is the dentry's if it is embedded there, else None."""

    inode: Inode
    location: Location | None


@dataclass(frozen=True, slots=True)
class Scope:
    """What every operation has: the volume's keys and the moment."""

    keys: Keys
    moment: Moment

    @property
    def now_ns(self) -> int:
        return self.moment.now_ns

    # -- reading -----------------------------------------------------------------------------------------------------

    def directory(self, view: View, ino: int) -> Inode:
        """A parent directory. NoSuchEntry if it has been removed: nothing can be in it any more."""
        kv = view.get(self.keys.inode(ino))
        if kv is None:
            raise NoSuchEntry("the directory has been removed")
        inode = codec.decode_inode(kv.value, kv.mod_revision)
        if not inode.is_dir:
            raise NotADirectory("the parent is not a directory")
        return inode

    def dentry(self, view: View, parent: int, name: bytes, *, likely_absent: bool = False) -> Dentry | None:
        kv = view.get(self.keys.dentry(parent, name), likely_absent=likely_absent)
        return codec.decode_dentry(kv.value, kv.mod_revision) if kv is not None else None

    def home_of(self, view: View, location: Location, dentry: Dentry) -> Home:
        """The inode that a dentry names."""
        if dentry.inode is not None:
            return Home(dentry.inode, location)
        kv = view.get(self.keys.inode(dentry.ino))
        if kv is None:
            raise CorruptRecord(f"dentry without inode {dentry.ino:#x}")
        return Home(codec.decode_inode(kv.value, kv.mod_revision), None)

    def named(self, view: View, location: Location) -> tuple[Inode, Home]:
        """The directory and the inode of a name that is to go. NoSuchEntry."""
        directory = self.directory(view, location[0])
        dentry = self.dentry(view, *location)
        if dentry is None:
            raise NoSuchEntry("no such name")
        return directory, self.home_of(view, location, dentry)

    def find(self, view: View, ino: int, location: Location | None) -> Home:
        """An inode by number: where it was last seen, where it has moved to, or in its own key. StaleInode if gone."""
        for _ in range(MOVES_MAX):
            if location is not None:
                dentry = self.dentry(view, *location)
                if dentry is not None and dentry.ino == ino and dentry.inode is not None:
                    return Home(dentry.inode, location)
            own = view.get(self.keys.inode(ino))
            if own is not None:
                return Home(codec.decode_inode(own.value, own.mod_revision), None)
            moved = view.get(self.keys.moved(ino))
            target = codec.decode_location(moved.value) if moved is not None else None
            if target is None or target == location:
                break
            location = target
        raise StaleInode(f"inode {ino:#x} has no name any more")

    # -- recording ---------------------------------------------------------------------------------------------------

    def place(self, home: Home) -> Location:
        """Where the inode is, as far as its record tells; (0, b"") for a file that has or had several names."""
        inode = home.inode
        return home.location or ((inode.parent, inode.name) if inode.is_dir else (0, b""))

    def change(
        self, kind: Kind, home: Home, *, mtime_offset_ns: int | None = None, atime_offset_ns: int | None = None
    ) -> Change:
        """The record of an operation after which the inode is as in `home`: all its attributes."""
        inode = home.inode
        return Change(
            kind,
            inode.ino,
            *self.place(home),
            self.now_ns,
            inode.mode,
            inode.size_bytes,
            uid=inode.uid,
            gid=inode.gid,
            body_version=inode.body_version,
            mtime_offset_ns=mtime_offset_ns,
            atime_offset_ns=atime_offset_ns,
            flags=int(inode.flags & (InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY)),
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def store(self, home: Home, inode: Inode) -> Put:
        """Write the inode back where it was found."""
        if home.location is None:
            return Put(self.keys.inode(inode.ino), codec.encode_inode(inode))
        return Put(self.keys.dentry(*home.location), codec.encode_embedded(inode))

    def touch(self, directory: int) -> Put:
        """A name in the directory has changed: its mtime and ctime, written blindly."""
        return Put(self.keys.times(directory), codec.encode_times(Times(self.now_ns, self.now_ns)))

    def bury(self, inode: Inode, parent: int, name: bytes) -> Put:
        """What has lost its last name: all that is needed to find its bodies, or to bring it back."""
        stone = Tombstone(inode.ino, self.moment.session, parent, name, inode, ())
        return Put(self.keys.tombstone(self.now_ns, inode.ino, inode.body_version + 1), codec.encode_tombstone(stone))

    def discard(self, before: Inode, after: Inode, location: Location | None) -> list[Put]:
        """Blobs that `before` refers to and `after` does not; `after` has the next body_version."""
        kept = {extent.blob for extent in after.extents}
        gone = {extent.blob: extent.blob_length for extent in before.extents if extent.blob not in kept}
        if not gone:
            return []
        parent, name = location or (0, b"")
        stone = Tombstone(before.ino, self.moment.session, parent, name, None, tuple(sorted(gone.items())))
        key = self.keys.tombstone(self.now_ns, before.ino, after.body_version)
        return [Put(key, codec.encode_tombstone(stone))]

    def drop_name(self, home: Home, location: Location) -> tuple[Inode, list[Put | Delete]]:
        """Take away one name of a file; what becomes of the inode. The dentry itself is the caller's to write."""
        inode = home.inode._replace(nlink=home.inode.nlink - 1, ctime_ns=self.now_ns)
        writes: list[Put | Delete] = []
        if inode.nlink > 0:
            writes.append(self.store(home, inode))
        else:
            writes.append(self.bury(inode, *location))
            if home.location is None:
                writes.append(Delete(self.keys.inode(inode.ino)))
            else:
                writes.append(Delete(self.keys.moved(inode.ino)))
        return inode, writes

    def drop_directory(self, inode: Inode) -> list[Put | Delete]:
        """Remove an empty directory's own keys; the dentry is the caller's to write."""
        writes: list[Put | Delete] = [
            Delete(self.keys.inode(inode.ino)),
            Delete(self.keys.times(inode.ino)),
            Delete(self.keys.child(inode.parent, inode.ino)),
        ]
        if inode.xattrs:
            prefix = self.keys.xattrs_of(inode.ino)
            writes.append(Delete(prefix, prefix[:-1] + b"0"))
        return writes


# -- checks -----------------------------------------------------------------------------------------------------------


def check_name(name: bytes) -> None:
    """A component of a path: NameTooLong over 255 bytes, InvalidArgument for what can't be a name."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes; at most {NAME_BYTES_MAX}")
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise InvalidArgument("not a file name")


def check_unsealed(inode: Inode) -> None:
    """Raises Sealed. Every operation that changes an inode compares its record, so a seal that comes in between is
    noticed."""
    if inode.seal:
        raise Sealed("it is in a sealed tree")


def check_may_add(directory: Inode) -> None:
    """Making a name in a directory. Raises Sealed, OperationNotPermitted."""
    check_unsealed(directory)
    if directory.flags & InodeFlag.IMMUTABLE:
        raise OperationNotPermitted("the directory is immutable")


def check_may_remove(directory: Inode, inode: Inode) -> None:
    """Removing or renaming a name: neither the directory nor the inode may be immutable, append-only or sealed, and
    no sealed tree lies below. Raises Sealed, HoldsSealed, OperationNotPermitted."""
    check_unsealed(directory)
    check_unsealed(inode)
    if inode.flags & InodeFlag.WAYPOINT:
        raise HoldsSealed("a sealed tree lies below the directory")
    if (directory.flags | inode.flags) & (InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY):
        raise OperationNotPermitted("the inode or its directory is immutable or append-only")


def inherited_gid(directory: Inode, gid: int) -> int:
    """In a setgid directory new entries get the directory's group."""
    return directory.gid if directory.mode & stat.S_ISGID else gid


def revised(inode: Inode, revision: int) -> Inode:
    """The inode as of the transaction that wrote it."""
    return inode._replace(revision=revision)
