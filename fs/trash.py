"""The trash: what was unlinked, as long as its tombstone stands, and how it gets a name again."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.fs.command_volume import command_volume
from apollofs.fs.user_error import UserError
from apollofs.metadata.collector import Stone, stone_of
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Inode
from apollofs.metadata.session import retry
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end
from apollofs.metadata.tree import Tree
from apollofs.metadata.use_questions import UseQuestions

ANSWER_WAIT_S = 30.0
PAGE_KEYS = 1000
READ_S = 30.0


@dataclass(frozen=True, slots=True)
class Trashed:
    """A file, symlink or node that has lost its last name."""

    stone: Stone
    inode: Inode
    """As it was before."""
    path: bytes
    """Where it was."""
    has_place: bool
    """Whether the directory that it was in still exists; else `path` is its name only."""


class Trash:
    """The tombstones of one volume. Methods raise DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, volume: str) -> None:
        self._store = store
        self._volume = volume
        self._keys = Keys(volume)
        self._tree = Tree(store, self._keys)

    async def list(self, since_ns: int, count_max: int) -> list[Trashed]:
        """What was unlinked from `since_ns` on, oldest first; at most `count_max`."""
        found: list[Trashed] = []
        start = self._keys.tombstone(since_ns, 0, 0)
        while len(found) < count_max:
            page = await self._page(start)
            for kv in page[: count_max - len(found)]:
                trashed = await self._trashed(kv)
                if trashed is not None:
                    found.append(trashed)
            if len(page) < PAGE_KEYS:
                break
            start = page[-1].key + b"\0"
        return found

    async def find(self, ino: int) -> Trashed:
        """The inode with this number. Reads all tombstones. UserError if it is not there."""
        start, more = self._keys.tombstones, True
        while more:
            page = await self._page(start)
            for kv in page:
                start = kv.key + b"\0"
                trashed = await self._trashed(kv) if self._keys.parse_tombstone(kv.key)[1] == ino else None
                if trashed is not None:
                    return trashed
            more = len(page) == PAGE_KEYS
        raise UserError(f"inode {ino:#x} is not in the trash")

    async def restore(self, ino: int, to: bytes, version: str) -> bytes:
        """Give it a name again, where it was, or (`to` not empty) at a path whose directory exists; that path.

        Raises UserError while a mount has it open; EntryExists, NoSuchEntry, NotADirectory.
        """
        trashed = await self.find(ino)
        if not to and not trashed.has_place:
            raise UserError("the directory that it was in is gone: name another place with --to")
        head, _, name = (to.rstrip(b"/") or trashed.path).rpartition(b"/")
        directory = await self._tree.place(head)
        async with command_volume(self._store, self._volume, version) as volume:
            await self._check_unused(UseQuestions(self._store, self._keys, volume.session, ANSWER_WAIT_S), ino)
            await volume.restore(trashed.stone.key, directory.ino, name)
        return b"/".join((directory.path.rstrip(b"/"), name))

    async def _check_unused(self, questions: UseQuestions, ino: int) -> None:
        uses = await questions.ask([ino])
        for mount in (*uses.users.values(), *uses.silent):
            answer = "does not answer" if mount in uses.silent else "still has it open"
            raise UserError(f"{mount.host}:{mount.mountpoint} {answer}: try again later")

    async def _page(self, start: bytes) -> tuple[KeyValue, ...]:
        end = prefix_end(self._keys.tombstones)
        return (await retry(lambda: self._store.range(Range(start, end, limit=PAGE_KEYS)), READ_S)).kvs

    async def _trashed(self, kv: KeyValue) -> Trashed | None:
        stone = stone_of(self._keys, kv)
        inode = stone.tombstone.inode
        if inode is None or stone.tombstone.condemned:
            return None
        directory = await self._tree.path_of(stone.tombstone.parent)
        name = stone.tombstone.name
        path = name if directory is None else directory.rstrip(b"/") + b"/" + name
        return Trashed(stone, inode, path, directory is not None)
