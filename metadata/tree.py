"""A tree read from outside any mount: directories page by page, and the files in them with all that they consist of.

Nothing is pinned: a walk that takes hours must not need a revision that the store has forgotten. What is moved while
the walk goes may be met twice or not at all.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.codec import Dentry
from apollofs.metadata.errors import NoSuchEntry, NotADirectory, StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.ops.common import MOVES_MAX, Location
from apollofs.metadata.records import ROOT_INO, Inode
from apollofs.metadata.session import retry
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end

READ_S = 30.0
PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """A name in the tree and what it means. `path` starts at the volume's root."""

    path: bytes
    parent: int
    name: bytes
    ino: int
    file_type: int

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.file_type)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.file_type)


class Tree:
    """Reads a volume's names as they are. Methods raise DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def place(self, path: bytes) -> Place:
        """What a path means; b"" and b"/" are the root. One request for each component. NoSuchEntry, NotADirectory."""
        place = Place(b"/", ROOT_INO, b"", ROOT_INO, stat.S_IFDIR)
        for name in filter(None, path.split(b"/")):
            if not place.is_dir:
                raise NotADirectory(f"{name_text(place.path)} is no directory")
            dentry = await self._dentry(place.ino, name)
            if dentry is None:
                raise NoSuchEntry(f"there is no {name_text(name)} in {name_text(place.path)}")
            place = self._below(place, name, dentry)
        return place

    async def page(self, directory: Place, after: bytes) -> tuple[list[Place], bool]:
        """Names in a directory greater than `after`, in order, and whether more follow."""
        prefix = self._keys.dentries_of(directory.ino)
        start = prefix + after + b"\0" if after else prefix
        found = await retry(lambda: self._store.range(Range(start, prefix_end(prefix), limit=PAGE_KEYS)), READ_S)
        places = [self._below(directory, self._keys.parse_dentry(kv.key)[1], _decoded(kv)) for kv in found.kvs]
        return places, found.more

    async def file(self, place: Place) -> Inode:
        """The file that a name means now, with all its extents. StaleInode if it means another one, or nothing."""
        dentry = await self._dentry(place.parent, place.name)
        if dentry is None or dentry.ino != place.ino:
            raise StaleInode(f"{name_text(place.path)} is another file by now")
        inode = dentry.inode
        if inode is None:
            own = await self._one(self._keys.inode(place.ino))
            if own is None:
                raise StaleInode(f"{name_text(place.path)} is another file by now")
            inode = codec.decode_inode(own.value, own.mod_revision)
        return await self._whole(inode)

    async def find(self, ino: int, location: Location | None) -> Inode | None:
        """A file by its number and where it was last seen embedded, with all its extents; None if it has no name."""
        for _ in range(MOVES_MAX):
            asked = [Range(self._keys.inode(ino)), Range(self._keys.moved(ino))]
            asked += [Range(self._keys.dentry(*location))] if location is not None else []
            result = await retry(lambda asked=asked: self._store.txn((), asked), READ_S)  # type: ignore[misc]
            own, moved, *there = [answer.kvs for answer in result.ranges if answer is not None]
            dentry = _decoded(there[0][0]) if there and there[0] else None
            if dentry is not None and dentry.ino == ino and dentry.inode is not None:
                return await self._whole(dentry.inode)
            if own:
                return await self._whole(codec.decode_inode(own[0].value, own[0].mod_revision))
            if not moved or codec.decode_location(moved[0].value) == location:
                return None
            location = codec.decode_location(moved[0].value)
        raise StaleInode(f"inode {ino:#x} keeps moving")

    async def _whole(self, inode: Inode) -> Inode:
        if not inode.extent_pages:
            return inode
        prefix = self._keys.extents_of(inode.ino)
        found = await retry(lambda: self._store.range(Range(prefix, prefix_end(prefix))), READ_S)
        extents = tuple(extent for kv in found.kvs for extent in codec.decode_extents(kv.value))
        return inode._replace(extents=extents)

    async def path_of(self, directory: int) -> bytes | None:
        """Where a directory is; None if it, or one above it, is gone. One request for each component."""
        names: Sequence[bytes] = ()
        while directory != ROOT_INO:
            found = await self._one(self._keys.inode(directory))
            if found is None:
                return None
            inode = codec.decode_inode(found.value, found.mod_revision)
            names = (inode.name, *names)
            directory = inode.parent
        return b"/" + b"/".join(names)

    async def _dentry(self, parent: int, name: bytes) -> Dentry | None:
        kv = await self._one(self._keys.dentry(parent, name))
        return _decoded(kv) if kv is not None else None

    async def _one(self, key: bytes) -> KeyValue | None:
        found = await retry(lambda: self._store.range(Range(key)), READ_S)
        return found.kvs[0] if found.kvs else None

    def _below(self, directory: Place, name: bytes, dentry: Dentry) -> Place:
        path = directory.path.rstrip(b"/") + b"/" + name
        return Place(path, directory.ino, name, dentry.ino, dentry.file_type)


def _decoded(kv: KeyValue) -> Dentry:
    return codec.decode_dentry(kv.value, kv.mod_revision)
