"""Volume: one mounted namespace; the face of the metadata layer for `fs`.

Every read is linearizable: it asks the store. Every mutation is one transaction of the mount's session (`transact.py`).
What the kernel knows are numbers, so the volume remembers for each file where it was last seen; other mounts may have
moved it meanwhile, and `w/<ino>` or `i/<ino>` then say where it is.
"""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import trio

from apollofs.metadata import codec
from apollofs.metadata.codec import Dentry
from apollofs.metadata.delegations import Delegations
from apollofs.metadata.errors import (
    InvalidArgument,
    MetadataError,
    NameTooLong,
    NoSuchAttribute,
    NoSuchEntry,
    NotFormatted,
    SessionLost,
    StaleInode,
    UnknownSite,
)
from apollofs.metadata.keys import Keys
from apollofs.metadata.locks import LockManager
from apollofs.metadata.ops import inspect
from apollofs.metadata.ops.commit import CommitBody
from apollofs.metadata.ops.common import MOVES_MAX, Location, Scope, check_name
from apollofs.metadata.ops.create import Create
from apollofs.metadata.ops.link import Link
from apollofs.metadata.ops.rename import Rename
from apollofs.metadata.ops.rmdir import Rmdir
from apollofs.metadata.ops.setattr import SetAttributes
from apollofs.metadata.ops.unlink import Unlink
from apollofs.metadata.ops.xattr import SetXattr, check_attribute
from apollofs.metadata.records import (
    ROOT_INO,
    TARGET_BYTES_MAX,
    Body,
    BodyChange,
    DirectoryEntry,
    DirectoryPage,
    Inode,
    MountRecord,
    Owner,
    Renamed,
    RenameFlag,
    SetAttr,
    SiteRecord,
    Superblock,
    Usage,
)
from apollofs.metadata.session import Session, SessionOptions, open_session
from apollofs.metadata.store import KeyValue, Range, RangeResult, Store, prefix_end
from apollofs.metadata.transact import Transactor
from apollofs.metadata.usage import UsageKeeper, read_usage
from apollofs.metadata.view import Recollection

log = logging.getLogger(__name__)
LISTING_MAX = 20_000
"""Entries of a directory that are handed out at once when it is completely known."""
NODE_TYPES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
REOPEN_AFTER_S = 1.0


class Volume:
    """Made by `open_volume`.

    Every method raises NamespaceError leaves as POSIX says, StoreError, DeadlineExceeded; mutations SessionLost too.
    A method that takes an `ino` raises StaleInode if that inode has no name any more. Cancelled, a mutation may have
    been applied or not.
    """

    def __init__(
        self, store: Store, keys: Keys, superblock: Superblock, site: SiteRecord, options: SessionOptions
    ) -> None:
        self._store = store
        self._keys = keys
        self._options = options
        self.superblock = superblock
        self.site = site
        self._recollection = Recollection()
        self.delegations = Delegations(
            store, keys, enabled=options.delegations, wait_s=options.lease_ttl_s + options.operation_deadline_s
        )
        self._transactor = Transactor(store, keys, self._recollection, self.delegations, options.operation_deadline_s)
        self._session: Session | None = None
        self._locations: dict[int, Location] = {}
        self._usage = UsageKeeper(self._transactor, keys)
        self.locks = LockManager(store, keys, options)
        self.session_lost_hooks: list[Callable[[], None]] = []
        """Called, without await, after a session has been lost and before the next one begins."""

    # -- session -----------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The session that mutations belong to now. Raises SessionLost between a lost one and the next."""
        if self._session is None or not self._session.alive:
            raise SessionLost("the mount has lost its session and is opening a new one")
        return self._session

    async def serve(self, record: MountRecord, *, task_status: trio.TaskStatus[None]) -> None:
        """Hold a session until cancelled; after a lost one open the next. Runs in the mount's nursery."""
        started = False
        while True:
            session = await self._open_session(record, retry=started)
            self._session = session
            self.locks.begin(session)
            self.delegations.begin(session)
            if not started:
                started = True
                task_status.started()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._usage.keep, session)
                    nursery.start_soon(self.delegations.serve, session)
                    await session.keep_alive()
                    nursery.cancel_scope.cancel()
            except BaseException:
                await self._close_session(session)
                raise
            log.error("session %d has lost its lease: its locks and uncommitted writes are gone", session.number)
            self._session = None
            self._recollection.clear()
            self.delegations.end()
            self.locks.end()
            for hook in self.session_lost_hooks:
                hook()

    async def _open_session(self, record: MountRecord, *, retry: bool) -> Session:
        while True:
            try:
                session = await open_session(self._store, self._keys, self._options, record, self.site.id)
            except NotFormatted:
                raise
            except MetadataError as exc:
                if not retry:
                    raise
                log.error("no new session yet: %s", exc)
                await trio.sleep(REOPEN_AFTER_S)
                continue
            log.info("session %d begins on volume %s, site %s", session.number, self._keys.volume, self.site.name)
            return session

    async def _close_session(self, session: Session) -> None:
        with trio.CancelScope(shield=True):
            if session.alive:
                with trio.move_on_after(5), contextlib.suppress(MetadataError):
                    await self._usage.flush(session)
            self.locks.end()
            await session.close()

    def _scope(self) -> Scope:
        return Scope(self._keys, self._transactor.moment(self.session))

    # -- reading -----------------------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode that a name means. No request for what is delegated; otherwise one, and for a directory, or a file
        with several names, at most two."""
        check_name(name)
        key = self._keys.dentry(parent, name)
        for _ in range(MOVES_MAX):
            dentry, ahead = await self._dentry(parent, key)
            if dentry is None:
                raise NoSuchEntry("no such name")
            if dentry.inode is not None:
                self._locations[dentry.ino] = (parent, name)
                return dentry.inode
            inode = ahead or self._delegated_directory(dentry.ino) or await self._own(dentry.ino)
            if inode is not None:
                return inode
        raise StaleInode("the name keeps changing")

    async def _dentry(self, parent: int, key: bytes) -> tuple[Dentry | None, Inode | None]:
        """What a name means, and the inode that it refers to if that came along."""
        known = self.delegations.peek(parent, key)
        if known is not None:
            kv = known[0]
            return (codec.decode_dentry(kv.value, kv.mod_revision) if kv is not None else None), None
        expected = self._expected_reference(key)
        ahead = inspect.own_questions(self._keys, expected) if expected else ()
        found = await self._read_group(parent, [Range(key), *ahead], (expected,) if expected else ())
        dentry = inspect.single_dentry(found[0])
        if dentry is None or dentry.ino != expected:
            return dentry, None
        return dentry, inspect.own_inode(*found[1:])

    def _expected_reference(self, key: bytes) -> int:
        """The inode that a name meant when it was last read, if it was a reference: worth asking for in advance."""
        known = self._recollection.get(key)
        if known is None or known[0] is None:
            return 0
        dentry = codec.decode_dentry(known[0].value, 0)
        return dentry.ino if dentry.inode is None else 0

    async def _own(self, ino: int) -> Inode | None:
        return inspect.own_inode(*await self._read_group(ino, inspect.own_questions(self._keys, ino)))

    async def _read_group(self, group: int, asked: Sequence[Range], others: tuple[int, ...] = ()) -> list[RangeResult]:
        """Read what belongs to a group (and to `others`), and keep it as far as they are delegated.

        One request. Takes the group's delegation in passing, if it is time to.
        """
        if self.delegations.wants(group):
            taken = await self.delegations.take(group, asked)
            if taken is not None:
                return taken
        revision, found = await self._transactor.read(asked)
        for number in (group, *others):
            self.delegations.learn(number, asked, found, revision)
        return found

    def _delegated_directory(self, ino: int) -> Inode | None:
        """A directory whose group is delegated, without a request."""
        children = self.delegations.children(ino)
        own = self.delegations.peek(ino, self._keys.inode(ino))
        times = self.delegations.peek(ino, self._keys.times(ino))
        if children is None or own is None or own[0] is None or times is None:
            return None
        inode = codec.decode_inode(own[0].value, own[0].mod_revision)
        return inspect.with_directory(inode, codec.decode_times(times[0].value) if times[0] else None, children)

    def _delegated_file(self, ino: int) -> Inode | None:
        """A file whose dentry is in a group that is delegated, without a request."""
        location = self._locations.get(ino)
        known = self.delegations.peek(location[0], self._keys.dentry(*location)) if location else None
        if known is None or known[0] is None:
            return None
        dentry = codec.decode_dentry(known[0].value, known[0].mod_revision)
        return dentry.inode if dentry.ino == ino else None

    async def getattr(self, ino: int) -> Inode:
        """No request for what is delegated; otherwise one, unless another mount has moved the file."""
        inode = self._delegated_file(ino) or self._delegated_directory(ino)
        if inode is None:
            inode, _ = await self._by_number(ino, ())
        return inode

    async def _by_number(self, ino: int, more: tuple[Range, ...]) -> tuple[Inode, list[RangeResult]]:
        """The inode, and the answers to `more`, as of one revision."""
        location = self._locations.get(ino)
        for _ in range(MOVES_MAX):
            questions = inspect.number_questions(self._keys, ino, location)
            group = location[0] if location is not None else ino
            found = await self._read_group(group, [*questions, *more])
            answer = inspect.number_answer(ino, location, found)
            if answer.inode is not None:
                if location is not None:
                    self._locations[ino] = location
                return answer.inode, found[len(questions) :]
            if answer.moved is None:
                break
            location = answer.moved
        raise StaleInode(f"inode {ino:#x} has no name any more")

    async def read_body(self, ino: int) -> Body:
        """The inode with all its extents, or with its inline bytes. One request."""
        inode, (inline, pages) = await self._by_number(ino, inspect.body_questions(self._keys, ino))
        if inode.is_inline:
            return Body(inode, inline.kvs[0].value if inline.kvs else b"")
        if inode.extent_pages:
            extents = tuple(extent for kv in pages.kvs for extent in codec.decode_extents(kv.value))
            inode = replace(inode, extents=extents)
        return Body(inode)

    async def readdir(self, directory: int, after: bytes, limit: int, revision: int = 0) -> DirectoryPage:
        """Up to `limit` names greater than `after` (b"": from the first), in byte order, without "." and "..".

        One request; none, and the whole directory at once, if it is delegated and completely known. `revision` 0: the
        newest state; otherwise the snapshot of an earlier page (Compacted if it is no longer kept). A directory that
        has been removed is empty.
        """
        first = not after and not revision
        listed = self.delegations.listing(directory) if first else None
        if listed is not None and len(listed) <= LISTING_MAX:
            return self._page(directory, listed, False, 0)
        prefix = self._keys.dentries_of(directory)
        start = prefix + after + b"\0" if after else prefix
        asked = [Range(start, prefix_end(prefix), limit=limit, revision=revision)]
        if not first:
            _, (found,) = await self._transactor.read(asked)
            return self._page(directory, found.kvs, found.more, revision or found.revision)
        asked += inspect.own_questions(self._keys, directory)
        found = (await self._read_group(directory, asked))[0]
        if not found.more:
            self.delegations.learn_all(directory, found.kvs, found.revision)
        return self._page(directory, found.kvs, found.more, found.revision)

    def _page(self, directory: int, kvs: Sequence[KeyValue], more: bool, revision: int) -> DirectoryPage:
        at = len(self._keys.dentries_of(directory))
        entries = []
        for kv in kvs:
            dentry = codec.decode_dentry(kv.value, kv.mod_revision)
            entries.append(DirectoryEntry(kv.key[at:], dentry.ino, dentry.file_type, dentry.inode))
        return DirectoryPage(tuple(entries), more, revision)

    def remember(self, ino: int, parent: int, name: bytes) -> None:
        """The kernel learnt a file's number from a listing: remember where it is, as `lookup` does."""
        self._locations[ino] = (parent, name)

    def forget(self, ino: int) -> None:
        """The kernel has forgotten the number; what was remembered of where it is goes."""
        self._locations.pop(ino, None)

    async def warm_up(self) -> None:
        """Read what nearly every operation takes part in: the root, and the line of directory moves. One request."""
        await self._by_number(ROOT_INO, (Range(self._keys.dirmove),))

    # -- names -------------------------------------------------------------------------------------------------------

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, owner: Owner) -> Inode:
        """A regular file, fifo, socket or device (the type is in `mode`). One request. EntryExists if there."""
        if stat.S_IFMT(mode) not in NODE_TYPES:
            raise InvalidArgument("not a type that mknod makes")
        return await self._create(parent, name, mode, owner, rdev=rdev)

    async def mkdir(self, parent: int, name: bytes, mode: int, owner: Owner) -> Inode:
        """One request. `mode`: permission bits."""
        return await self._create(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), owner)

    async def symlink(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Inode:
        """One request. NameTooLong for a target of more than 4,095 bytes."""
        if len(target) > TARGET_BYTES_MAX:
            raise NameTooLong(f"a symlink's target has at most {TARGET_BYTES_MAX} bytes")
        return await self._create(parent, name, stat.S_IFLNK | 0o777, owner, target=target)

    async def _create(
        self, parent: int, name: bytes, mode: int, owner: Owner, *, rdev: int = 0, target: bytes = b""
    ) -> Inode:
        check_name(name)
        scope, session = self._scope(), self.session
        operation = Create(scope, session.new_ino(), parent, name, mode, owner, rdev, target)
        inode = await self._transactor.run(session, operation, time_ns=scope.now_ns)
        if not inode.is_dir:
            self._locations[inode.ino] = (parent, name)
        return inode

    async def link(self, ino: int, new_parent: int, new_name: bytes) -> Inode:
        """One more name for a file. One request."""
        check_name(new_name)
        scope = self._scope()
        operation = Link(scope, ino, self._locations.get(ino), new_parent, new_name)
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns)

    async def unlink(self, parent: int, name: bytes) -> Inode:
        """Take away a name. One request. Returns the inode as it is after: with nlink 0, what open handles need."""
        check_name(name)
        scope = self._scope()
        return await self._transactor.run(self.session, Unlink(scope, parent, name), time_ns=scope.now_ns)

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        """One request."""
        check_name(name)
        scope = self._scope()
        return await self._transactor.run(self.session, Rmdir(scope, parent, name), time_ns=scope.now_ns)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: RenameFlag = RenameFlag(0)
    ) -> Renamed:
        """renameat2 with NOREPLACE or EXCHANGE. One request if both names are known, whatever moves."""
        check_name(name)
        check_name(new_name)
        if int(flags) not in (0, RenameFlag.NOREPLACE, RenameFlag.EXCHANGE):
            raise InvalidArgument("unknown or contradictory rename flags")
        scope = self._scope()
        source, target = (parent, name), (new_parent, new_name)
        done = await self._transactor.run(self.session, Rename(scope, source, target, flags), time_ns=scope.now_ns)
        self._relocate(done.moved, target)
        if flags & RenameFlag.EXCHANGE and done.replaced is not None:
            self._relocate(done.replaced, source)
        return done

    def _relocate(self, inode: Inode, location: Location) -> None:
        if inode.ino in self._locations:
            self._locations[inode.ino] = location

    # -- attributes and bodies ---------------------------------------------------------------------------------------

    async def setattr(self, ino: int, change: SetAttr) -> Inode:
        """One request (a truncation of an inline or very fragmented body may read it first)."""
        scope = self._scope()
        operation = SetAttributes(scope, ino, self._locations.get(ino), change)
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns)

    async def commit_body(self, ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        """One request. Raises BodyConflict, TooManyExtents; SessionLost if `session`, in which the change was
        prepared, is no longer the mount's."""
        if session is not None and session is not self.session:
            raise SessionLost("the change was prepared in a session that has been lost")
        scope = self._scope()
        operation = CommitBody(scope, ino, self._locations.get(ino), change)
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns)

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """One request. NoSuchAttribute."""
        check_attribute(name)
        _, (found,) = await self._transactor.read([Range(self._keys.xattr(ino, name))])
        if not found.kvs:
            raise NoSuchAttribute("no such attribute")
        return found.kvs[0].value

    async def listxattr(self, ino: int) -> tuple[bytes, ...]:
        """All names, in byte order. One request."""
        prefix = self._keys.xattrs_of(ino)
        _, (found,) = await self._transactor.read([Range(prefix, prefix_end(prefix), keys_only=True)])
        return tuple(self._keys.parse_xattr(kv.key)[1] for kv in found.kvs)

    async def setxattr(
        self, ino: int, name: bytes, value: bytes, *, create: bool = False, replace: bool = False
    ) -> None:
        """One request. AttributeExists (create), NoSuchAttribute (replace), AttributeTooLarge."""
        check_attribute(name, value)
        if create and replace:
            raise InvalidArgument("create and replace exclude each other")
        await self._set_xattr(ino, name, value, create, replace)

    async def removexattr(self, ino: int, name: bytes) -> None:
        """One request. NoSuchAttribute."""
        check_attribute(name)
        await self._set_xattr(ino, name, None, False, False)

    async def _set_xattr(self, ino: int, name: bytes, value: bytes | None, create: bool, replace: bool) -> None:
        scope = self._scope()
        operation = SetXattr(scope, ino, self._locations.get(ino), name, value, create, replace)
        await self._transactor.run(self.session, operation, time_ns=scope.now_ns)

    # -- the whole ---------------------------------------------------------------------------------------------------

    def new_blob(self) -> int:
        """A number for a new blob of this session: site << 56 | session << 32 | counter. No request."""
        return self.session.new_blob()

    async def usage(self) -> Usage:
        """What the volume holds; other mounts' last few seconds may be missing. One request."""
        return await read_usage(self._transactor, self._keys, self._session)

    async def sites(self) -> tuple[SiteRecord, ...]:
        _, (found,) = await self._transactor.read([Range(self._keys.sites, prefix_end(self._keys.sites))])
        return tuple(codec.decode_site(kv.value) for kv in found.kvs)


@contextlib.asynccontextmanager
async def open_volume(
    store: Store, volume: str, site: str, options: SessionOptions, record: MountRecord
) -> AsyncIterator[Volume]:
    """Open a volume for a mount at `site` and hold its session while the context lasts.

    `record` says who mounts; its session number is filled in. Raises NotFormatted, UnknownSite, StoreError.
    """
    keys = Keys(volume)
    found = await store.txn((), (Range(keys.superblock), Range(keys.site(site)), Range(keys.inode(ROOT_INO))))
    superblock, site_found, _ = found.ranges
    assert superblock is not None and site_found is not None
    if not superblock.kvs:
        raise NotFormatted(f"there is no volume {volume!r}: make it with `apollofs format`")
    if not site_found.kvs:
        raise UnknownSite(f"volume {volume!r} has no site {site!r}: see `apollofs site list`")
    opened = Volume(
        store,
        keys,
        codec.decode_superblock(superblock.kvs[0].value),
        codec.decode_site(site_found.kvs[0].value),
        options,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(opened.serve, record)
        await opened.warm_up()
        try:
            yield opened
        finally:
            nursery.cancel_scope.cancel()
