"""Small files as a key-value store, without a mount: a key is a name in a directory, its value is the file's body.

    async with open_volume("etcd://host:2379/volume", site="west") as volume:
        counters = await volume.kv("/counters", create=True)
        await counters.put("step", b"1")
        value = await counters.get("step")
        await counters.put_if("step", b"2", value.revision)

`docs/KV.md` is for its users; `api.py` opens volumes. A client is a session of its own, as a mount is: it is fenced by
its journal slots, recalls the delegations of mounts that cache what it changes, and caches under delegations itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from apollofs.blobstore import BlobStoreFull
from apollofs.fs.errors import BodyError, MissingBlob
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata.errors import (
    EntryExists,
    InvalidArgument,
    IsADirectory,
    NamespaceError,
    NoSuchEntry,
    NotADirectory,
    RequestTooLarge,
    SessionLost,
)
from apollofs.metadata.ops.put_values import ABSENT, ValueWrite
from apollofs.metadata.records import ROOT_INO, Body, DirectoryEntry, Inode, Owner
from apollofs.metadata.session import Session
from apollofs.metadata.store import NOW
from apollofs.metadata.value_history import NameWatch
from apollofs.metadata.volume import Volume, check_locations

T = TypeVar("T")
Key = str | bytes
PAGE_MAX = 1000
SESSION_POLL_S = 0.05
CACHED_GETS_IN_TURN = 64
"""Gets that are answered without a checkpoint, one after the other: then others may run, the keepalive too."""


class Value(NamedTuple):
    """A value as of the revision at which it was read."""

    data: bytes
    revision: int
    """Grows with each change of the file, of its attributes too; for `put_if`."""
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A key in a listing."""

    key: str
    size_bytes: int | None
    """None, and the revision too: a file that has or had several names; `get` tells."""
    revision: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """Keys in byte order. `after` goes into the call for the next page, with `revision`; None: this is the last one."""

    entries: tuple[Entry, ...]
    revision: int
    """All pages that are asked for with it are one snapshot; a watch from the next revision misses nothing."""
    after: str | None


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """A key has got a value, or other attributes, or (`deleted`) means no regular file any more."""

    key: str
    revision: int
    deleted: bool
    size_bytes: int | None = None
    """As in `Entry`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One part of a transaction; made by `KeyValues.change`, `removal` and `unchanged`."""

    directory: int
    key: bytes
    revision: int | None
    data: bytes | None
    remove: bool
    mode: int


class KeyWatch:
    """Made by `KeyValues.watch`: iterate over it. Raises Compacted (`first_revision`: the first that can be had)."""

    def __init__(self, names: NameWatch) -> None:
        self._names = names

    @property
    def position(self) -> int:
        """`from_revision` of a watch that goes on behind what was handed out, nothing left out. If that was a part of a
        transaction, the others of it come once more."""
        return self._names.position

    def __aiter__(self) -> KeyWatch:
        return self

    async def __anext__(self) -> KeyEvent:
        change = await anext(self._names)
        key, entry = os.fsdecode(change.name), change.entry
        if entry is None or not _may_be_value(entry):
            return KeyEvent(key, change.revision, True)
        return KeyEvent(key, change.revision, False, entry.inode.size_bytes if entry.inode is not None else None)


class Client:
    """A volume that is open without a mount; made by `api.open_volume`. `volume` writes nothing ahead of the store."""

    def __init__(self, volume: Volume, bodies: ValueBodies, owner: Owner, deadline_s: float) -> None:
        self._volume = volume
        self._bodies = bodies
        self._owner = owner
        self._deadline_s = deadline_s

    async def kv(self, directory: str | bytes, *, create: bool = False) -> KeyValues:
        """The keys of a directory, wherever it is moved to later. One request for each component that is not cached.

        `create` makes what is missing, with mode 755. Raises NoSuchEntry, NotADirectory.
        """
        ino = ROOT_INO
        for name in filter(None, os.fsencode(directory).split(b"/")):
            ino = await self.in_session(partial(self._child, ino, name, create), repeatable=True)
        return KeyValues(self, self._volume, self._bodies, ino)

    async def _child(self, parent: int, name: bytes, create: bool) -> int:
        try:
            inode = await self._volume.lookup(parent, name)
        except NoSuchEntry:
            if not create:
                raise NoSuchEntry(f"there is no directory {os.fsdecode(name)!r}") from None
            try:
                inode = await self._volume.mkdir(parent, name, 0o755, self._owner)
            except EntryExists:
                inode = await self._volume.lookup(parent, name)
        self._volume.forget(inode.ino)
        if not inode.is_dir:
            raise NotADirectory(f"{os.fsdecode(name)!r} is no directory")
        return inode.ino

    async def transaction(self, changes: Sequence[Change]) -> int:
        """All of the changes or none, in one transaction; its revision, or 0 if there was nothing to change.

        Up to 16 keys, in whatever directories of the volume, each once, with up to 1.5 MiB of small values together.
        Raises RevisionConflict (of the first that does not hold), NoSuchEntry (a directory has been removed),
        RequestTooLarge, FileTooLarge, InvalidArgument, IsADirectory, OperationNotPermitted; SessionLost and
        DeadlineExceeded with `in_doubt`, or a message, that say whether they may have been made.
        """
        once = tuple(changes)
        check_locations([(change.directory, change.key) for change in once])
        for change in once:
            self._bodies.check(len(change.data or b""))
        return await self.in_session(lambda: self._transact(once))

    async def _transact(self, changes: Sequence[Change]) -> int:
        session = self._volume.session
        await self._check_conditions(session, changes)
        values: list[ValueWrite] = []
        try:
            for change in changes:
                values.append(await self._prepare(session, change))  # noqa: PERF401  (they count when a later one fails)
            revision, _ = await self._volume.put_values(values, session)
        except (NamespaceError, RequestTooLarge, BodyError, BlobStoreFull):
            # it was refused, or not even asked for: nobody will ever refer to what was uploaded
            for value in values:
                if value.body is not None:
                    await self._bodies.discard(value.body)
            raise
        return revision

    async def _check_conditions(self, session: Session, changes: Sequence[Change]) -> None:
        """Nothing large is uploaded for what would be refused. One request, where there is a large value."""
        if not any(self._bodies.is_uploaded(len(change.data or b"")) for change in changes):
            return
        compared = [ValueWrite((each.directory, each.key), each.revision) for each in changes]
        compared = [each for each in compared if each.expected is not None]
        if compared:
            await self._volume.put_values(compared, session)

    async def _prepare(self, session: Session, change: Change) -> ValueWrite:
        body = None
        if change.data is not None:
            body = await self._bodies.store(change.data, session, change.mode, self._owner)
        return ValueWrite((change.directory, change.key), change.revision, body, change.remove)

    async def in_session(self, call: Callable[[], Awaitable[T]], *, repeatable: bool = False) -> T:
        """`call`; again in the next session if the one it was made in is lost and surely nothing was changed, or (it is
        `repeatable`) whatever was changed: who reads only may have taken a delegation.

        Raises SessionLost where it may have been, or when there is no new session within the deadline of an operation.
        """
        deadline = trio.current_time() + self._deadline_s
        while True:
            try:
                return await call()
            except SessionLost as exc:
                if (exc.in_doubt and not repeatable) or trio.current_time() > deadline:
                    raise
            await trio.sleep(SESSION_POLL_S)


class KeyValues:
    """The keys of one directory; made by `Client.kv`.

    A key is a file name: 1 to 255 bytes, any but "/" and NUL (text is encoded as file names are). Every method raises
    StoreError and its leaves, DeadlineExceeded, InvalidArgument, NameTooLong; those that move large values
    BodyUnavailable, CorruptBody. What is no regular file is no value: IsADirectory, InvalidArgument.
    """

    def __init__(self, client: Client, volume: Volume, bodies: ValueBodies, directory: int) -> None:
        self._client = client
        self._volume = volume
        self._bodies = bodies
        self._directory = directory
        self._in_turn = 0

    # -- reading -----------------------------------------------------------------------------------------------------

    async def get(self, key: Key, *, revision: int = 0) -> Value:
        """The value of a key: newest, or as it was at a revision of the store.

        No request for what this client holds delegated; otherwise one, and those for the blocks of a large value.
        Raises NoSuchEntry; FileTooLarge; Compacted for a revision that is no longer kept.
        """
        name = os.fsencode(key)
        if not revision:
            body = self._volume.cached_value(self._directory, name)
            if body is not None and body.inode.is_inline and len(body.inline) == body.inode.size_bytes:
                await self._breathe()
                return Value(body.inline, body.inode.revision, body.inode.mtime_ns)
            return await self._client.in_session(lambda: self._get(name), repeatable=True)
        return await self._load(await self._volume.history.read(self._directory, name, revision))

    async def _breathe(self) -> None:
        """A checkpoint now and then: who only reads what is cached must not keep everybody else from running."""
        self._in_turn += 1
        if self._in_turn < CACHED_GETS_IN_TURN:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._in_turn = 0
            await trio.lowlevel.checkpoint()

    async def _get(self, name: bytes) -> Value:
        tried: Inode | None = None
        while True:
            body = await self._volume.read_value(self._directory, name)
            try:
                return await self._load(body)
            except MissingBlob:
                # it was replaced and collected meanwhile; but not the same one twice
                same = tried is not None and (tried.ino, tried.body_version) == (
                    body.inode.ino,
                    body.inode.body_version,
                )
                if same:
                    raise
                tried = body.inode

    async def _load(self, body: Body) -> Value:
        inode = body.inode
        if inode.is_dir:
            raise IsADirectory("a directory is no value")
        if not inode.is_file:
            raise InvalidArgument("what is no regular file is no value")
        return Value(await self._bodies.load(body), inode.revision, inode.mtime_ns)

    async def list(self, prefix: Key = "", *, after: Key = "", limit: int = PAGE_MAX, revision: int = 0) -> Page:
        """A page of keys with a prefix, in byte order, of up to `limit` names (1 to 1,000). One request.

        `after` and `revision` come from the page before. Raises Compacted where that is too long ago: list anew.
        """
        if not 1 <= limit <= PAGE_MAX:
            raise InvalidArgument(f"a page has 1 to {PAGE_MAX} keys")
        names = os.fsencode(prefix), os.fsencode(after)
        found = await self._client.in_session(
            lambda: self._volume.list_values(self._directory, *names, limit, revision), repeatable=True
        )
        entries = tuple(_entry(each) for each in found.entries if _may_be_value(each))
        last = os.fsdecode(found.entries[-1].name) if found.more else None
        return Page(entries, found.revision, last)

    @asynccontextmanager
    async def watch(self, prefix: Key = "", *, from_revision: int = NOW) -> AsyncIterator[KeyWatch]:
        """Every change of the keys with a prefix: in order, none missing and none twice, whatever breaks meanwhile.

            async with kv.watch("step", from_revision=page.revision + 1) as events:
                async for event in events: ...

        `from_revision` NOW: all that happens once the block is entered. What was answered by a mount and is not in etcd
        yet is told when it is, some milliseconds later. Of a file with several names it is told what becomes of this
        name, not of its bytes.
        """
        async with self._volume.history.watch(self._directory, os.fsencode(prefix), from_revision) as names:
            yield KeyWatch(names)

    # -- changing ----------------------------------------------------------------------------------------------------

    async def put(self, key: Key, value: bytes, *, mode: int = 0o644) -> int:
        """Make `value` the value of a key, whatever it was; the revision. One request, after the upload of a large one.

        `mode`: permission bits, if the key is new. Raises what `Client.transaction` does.
        """
        return await self._client.transaction((self.change(key, value, mode=mode),))

    async def put_if(self, key: Key, value: bytes, revision: int, *, mode: int = 0o644) -> int:
        """As `put`, only if the key is at `revision` (0: there is none). Raises RevisionConflict, with its revision."""
        return await self._client.transaction((self.change(key, value, revision=revision, mode=mode),))

    async def put_if_absent(self, key: Key, value: bytes, *, mode: int = 0o644) -> int:
        """As `put`, only if there is no such name. Raises RevisionConflict, with its revision."""
        return await self.put_if(key, value, ABSENT, mode=mode)

    async def delete(self, key: Key, *, revision: int | None = None) -> bool:
        """Remove a key; whether there was one. With `revision` only if it is at that. Raises RevisionConflict."""
        return await self._client.transaction((self.removal(key, revision=revision),)) > 0

    async def transaction(self, changes: Sequence[Change]) -> int:
        """See `Client.transaction`: the changes may be of other directories of the volume, too."""
        return await self._client.transaction(changes)

    def change(self, key: Key, value: bytes, *, revision: int | None = None, mode: int = 0o644) -> Change:
        """For a transaction: put a value; with `revision` only if the key is at that (0: absent). TypeError for what
        has no bytes: text, numbers."""
        data = value if isinstance(value, bytes) else bytes(memoryview(value))
        return Change(self._directory, os.fsencode(key), revision, data, False, mode)

    def removal(self, key: Key, *, revision: int | None = None) -> Change:
        """For a transaction: remove a key, if there is one; with `revision` only if it is at that."""
        return Change(self._directory, os.fsencode(key), revision, None, True, 0)

    def unchanged(self, key: Key, revision: int) -> Change:
        """For a transaction: only if the key is at `revision` (0: absent). Recalls the directory as a change does."""
        return Change(self._directory, os.fsencode(key), revision, None, False, 0)


def _may_be_value(entry: DirectoryEntry) -> bool:
    return stat.S_ISREG(entry.file_type)


def _entry(entry: DirectoryEntry) -> Entry:
    inode = entry.inode
    if inode is None:
        return Entry(os.fsdecode(entry.name), None, None)
    return Entry(os.fsdecode(entry.name), inode.size_bytes, inode.revision)
