"""What happened to the names of a directory, in order, and what a value was at an earlier revision."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import NoSuchEntry
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.inspect import body_questions
from apollofs.metadata.records import Body, DirectoryEntry
from apollofs.metadata.session import retry
from apollofs.metadata.store import NOW, Event, KeyValue, Range, Store, WatchBatch, prefix_end


@dataclass(frozen=True, slots=True)
class NameChange:
    """What a name means since `revision`: `entry`, or nothing (None)."""

    name: bytes
    revision: int
    entry: DirectoryEntry | None


class NameWatch:
    """Made by `ValueHistory.watch`: an iterator over changes, in the order of revisions, none missing, none twice.

    Raises Compacted when what it owes next is no longer kept.
    """

    def __init__(self, batches: AsyncIterator[WatchBatch], keys: Keys, start_revision: int) -> None:
        self._batches = batches
        self._keys = keys
        self._waiting: list[Event] = []
        self.position = start_revision
        """A watch that starts at this revision goes on behind what was handed out; if that was a part of a transaction,
        with all of the transaction."""

    def __aiter__(self) -> NameWatch:
        return self

    async def begin(self) -> None:
        """Wait until a watch that starts now has begun: what happens from here on is told."""
        self.position = (await anext(self._batches)).revision + 1

    async def __anext__(self) -> NameChange:
        while not self._waiting:
            batch = await anext(self._batches)
            self._waiting = list(batch.events)[::-1]
            if not self._waiting:
                self.position = max(self.position, batch.revision + 1)
        kv = self._waiting[-1].kv
        change = self._change(self._waiting.pop())
        more = self._waiting and self._waiting[-1].kv.mod_revision == kv.mod_revision
        self.position = kv.mod_revision if more else kv.mod_revision + 1
        return change

    def _change(self, event: Event) -> NameChange:
        kv = event.kv
        name = self._keys.parse_dentry(kv.key)[1]
        if event.deleted:
            return NameChange(name, kv.mod_revision, None)
        dentry = codec.decode_dentry(kv.value, kv.mod_revision)
        return NameChange(name, kv.mod_revision, DirectoryEntry(name, dentry.ino, dentry.file_type, dentry.inode))


class ValueHistory:
    """The past of a volume's names. Needs no session. Methods raise StoreError."""

    def __init__(self, store: Store, keys: Keys, deadline_s: float) -> None:
        self._store = store
        self._keys = keys
        self._deadline_s = deadline_s

    async def read(self, parent: int, name: bytes, revision: int) -> Body:
        """What a name meant at a revision, with its whole body as it was then. Up to four requests.

        Raises NoSuchEntry, Compacted, DeadlineExceeded.
        """
        found = await self._one(self._keys.dentry(parent, name), revision)
        if found is None:
            raise NoSuchEntry("no such name at that revision")
        dentry = codec.decode_dentry(found.value, found.mod_revision)
        inode = dentry.inode
        if inode is None:
            own = await self._one(self._keys.inode(dentry.ino), revision)
            if own is None:
                raise NoSuchEntry("no such inode at that revision")
            inode = codec.decode_inode(own.value, own.mod_revision)
        if inode.is_inline and not inode.copy:
            inline = await self._one(self._keys.inline(inode.inline_number), revision)
            return Body(inode, inline.value if inline is not None else b"")
        if not inode.extent_pages:
            return Body(inode, inode.copy)
        pages = await self._range(body_questions(self._keys, inode.ino)[1]._replace(revision=revision))
        return Body(inode._replace(extents=tuple(e for kv in pages for e in codec.decode_extents(kv.value))))

    @asynccontextmanager
    async def watch(self, parent: int, prefix: bytes, from_revision: int = NOW) -> AsyncIterator[NameWatch]:
        """Every change of the names with a prefix from a revision on; NOW: from some moment before this is entered.

        Goes on by itself when the connection breaks.
        """
        names = self._keys.dentries_of(parent) + prefix
        async with self._store.watch(names, prefix_end(names), start_revision=from_revision) as batches:
            watch = NameWatch(batches, self._keys, from_revision)
            if from_revision == NOW:
                await watch.begin()
            yield watch

    async def _one(self, key: bytes, revision: int) -> KeyValue | None:
        found = await self._range(Range(key, revision=revision))
        return found[0] if found else None

    async def _range(self, asked: Range) -> tuple[KeyValue, ...]:
        return (await retry(lambda: self._store.range(asked), self._deadline_s)).kvs
