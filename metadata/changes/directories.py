"""Where directories were at a point of the log: a bounded map that moves along with it.

What the map holds is as of just after the last change that was applied. A directory that it does not hold is looked up
as of just before the transaction in hand: in etcd's history, or among what a segment says. Nothing of that can be
wrong: the map sees every later move, as it is a record of the log.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Mapping

from apollofs.metadata import codec
from apollofs.metadata.changes.segment import Place
from apollofs.metadata.errors import Compacted
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.rename import DEPTH_MAX
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store

DIRECTORIES_MAX = 100_000
READ_S = 30.0


def places(change: Change) -> tuple[int, ...]:
    """The directories whose place a change says; the other one of an exchange may be a file."""
    if change.kind == Kind.EXCHANGE:
        return (change.ino, change.ino2) if stat.S_ISDIR(change.mode) else (change.ino2,)
    moved = change.kind == Kind.RENAME and stat.S_ISDIR(change.mode)
    return (change.ino,) if moved or change.kind == Kind.MKDIR else ()


class Directories:
    """One reader's map. Methods that look up raise DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, store: Store, keys: Keys, size_max: int = DIRECTORIES_MAX) -> None:
        self._store = store
        self._keys = keys
        self._size_max = size_max
        self._places: OrderedDict[int, Place | None] = OrderedDict()
        """None: nobody knows."""
        self._paths: dict[int, bytes | None] = {ROOT_INO: b"/"}

    def begin(self, places: Mapping[int, Place]) -> None:
        """A segment begins, which says where the directories are that it names."""
        self._places = OrderedDict(places)
        self._forget_paths()

    def path(self, directory: int, name: bytes) -> bytes | None:
        """The path of a name in a directory whose `where` was asked; the root for its own name, which is empty."""
        if directory == 0:
            return None
        found = self._paths.get(directory)
        if found is None or not name:
            return found
        return b"%s%s" % (found, name) if directory == ROOT_INO else b"%s/%s" % (found, name)

    def know(self, change: Change) -> bool:
        """Whether there is nothing to `prepare`."""
        paths = self._paths
        return (not change.parent or change.parent in paths) and (not change.old_parent or change.old_parent in paths)

    async def prepare(self, change: Change, revision: int) -> None:
        """See that the directories which a change of `revision` names are known, if anybody knows them."""
        for directory in (change.parent, change.old_parent):
            if directory and directory not in self._paths:
                await self._resolve(directory, revision)

    async def place(self, directory: int, revision: int) -> Place | None:
        """Where a directory was before the transaction at `revision`, or is after those of its changes that were
        applied here. None if nobody knows."""
        if directory not in self._places:
            self._put(directory, await self._look_up(directory, revision - 1))
        return self._places[directory]

    def apply(self, change: Change) -> None:
        """The change has happened."""
        kind = change.kind
        if kind == Kind.MKDIR:
            self._put(change.ino, (change.parent, change.name))
        elif kind == Kind.RMDIR:
            self._remove(change.ino)
        elif kind in (Kind.RENAME, Kind.EXCHANGE):
            if kind == Kind.EXCHANGE:
                # whether the other one is a directory isn't said; if it is a file nobody asks for its place
                self._put(change.ino2, (change.old_parent, change.old_name))
                self._forget_paths()
            if stat.S_ISDIR(change.mode):
                if kind == Kind.RENAME and change.ino2:
                    self._remove(change.ino2)
                self._move(change.ino, (change.parent, change.name))

    async def _resolve(self, directory: int, revision: int) -> None:
        """Find the paths of a directory and of those above it."""
        chain: list[tuple[int, bytes]] = []
        above = directory
        while above not in self._paths and len(chain) <= DEPTH_MAX:
            place = await self.place(above, revision)
            if place is None:
                self._paths[above] = None
                break
            chain.append((above, place[1]))
            above = place[0]
        for ino, name in reversed(chain):
            parent = self._paths.get(above)
            self._paths[ino] = None if parent is None else parent.rstrip(b"/") + b"/" + name
            above = ino

    async def _look_up(self, directory: int, revision: int) -> Place | None:
        asked = Range(self._keys.inode(directory), revision=max(revision, 1))
        try:
            found = await retry(lambda: self._store.range(asked), READ_S)
        except Compacted:
            return None
        if not found.kvs:
            return None
        inode = codec.decode_inode(found.kvs[0].value, found.kvs[0].mod_revision)
        return (inode.parent, inode.name) if inode.is_dir else None

    def _put(self, directory: int, place: Place | None) -> None:
        self._places[directory] = place
        if len(self._places) > self._size_max:
            self._places.popitem(last=False)
            if len(self._paths) > self._size_max:
                self._forget_paths()

    def _move(self, directory: int, place: Place) -> None:
        self._put(directory, place)
        self._forget_paths()

    def _remove(self, directory: int) -> None:
        self._places.pop(directory, None)
        self._paths.pop(directory, None)

    def _forget_paths(self) -> None:
        self._paths = {ROOT_INO: b"/"}
