"""Volume: one mounted namespace; the face of the metadata layer for `fs`.

Reading is in `namespace_reader.py` and `value_reader.py`, the mount's session in `held_volume.py`. Every mutation is
one transaction of that session (`transact.py`); in what the mount holds exclusively, names and attributes change at
once and their transaction follows (`ahead.py`).
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import AsyncIterator, Sequence

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import (
    InvalidArgument,
    NameTooLong,
    NoSuchAttribute,
    SessionLost,
    UnknownSite,
)
from apollofs.metadata.format import absence
from apollofs.metadata.held_volume import HeldVolume
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.commit import CommitBody
from apollofs.metadata.ops.common import Location, check_name
from apollofs.metadata.ops.create import Create
from apollofs.metadata.ops.link import Link
from apollofs.metadata.ops.put_values import ABSENT, VALUES_MAX, PutValues, ValueWrite
from apollofs.metadata.ops.rename import Rename
from apollofs.metadata.ops.restore import Restore
from apollofs.metadata.ops.rmdir import Rmdir
from apollofs.metadata.ops.setattr import SetAttributes
from apollofs.metadata.ops.unlink import Unlink
from apollofs.metadata.ops.xattr import SetXattr, check_attribute
from apollofs.metadata.records import (
    TARGET_BYTES_MAX,
    Body,
    BodyChange,
    Inode,
    MountRecord,
    Owner,
    Renamed,
    RenameFlag,
    SetAttr,
    SiteRecord,
    Usage,
)
from apollofs.metadata.session import Session, SessionOptions, retry
from apollofs.metadata.store import Range, Store, prefix_end
from apollofs.metadata.usage import read_usage

NODE_TYPES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)


def check_locations(locations: Sequence[Location]) -> None:
    """Whether a put may be of these: NameTooLong, InvalidArgument for more than VALUES_MAX, one that comes twice, and
    what can't be a name."""
    if len(locations) > VALUES_MAX or len(set(locations)) < len(locations):
        raise InvalidArgument(f"a transaction changes up to {VALUES_MAX} keys, each once")
    for _, name in locations:
        check_name(name)


class Volume(HeldVolume):
    """Made by `open_volume`.

    Every method raises NamespaceError leaves as POSIX says, StoreError, DeadlineExceeded; mutations SessionLost too.
    A method that takes an `ino` raises StaleInode if that inode has no name any more. Cancelled, a mutation may have
    been applied or not.
    """

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
        inode = await self._transactor.run(session, operation, time_ns=scope.now_ns, at_once=True)
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
        operation = Unlink(scope, parent, name)
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns, at_once=True)

    async def restore(self, tombstone: bytes, parent: int, name: bytes) -> Inode:
        """Give what was unlinked (the key of its tombstone) a name again. One request. NoSuchEntry, EntryExists."""
        check_name(name)
        scope = self._scope()
        inode = await self._transactor.run(self.session, Restore(scope, tombstone, parent, name), time_ns=scope.now_ns)
        self._locations[inode.ino] = (parent, name)
        return inode

    async def rmdir(self, parent: int, name: bytes) -> Inode:
        """One request."""
        check_name(name)
        scope = self._scope()
        operation = Rmdir(scope, parent, name)
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns, at_once=True)

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
        if done.replaced is not None and done.replaced.ino == done.moved.ino:
            await self.settle()  # nothing was written: what came before is durable all the same
            return done
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
        at_once = change.size_bytes is None
        return await self._transactor.run(self.session, operation, time_ns=scope.now_ns, at_once=at_once)

    async def commit_body(self, ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        """One request. Raises BodyConflict, CloneSourceChanged, TooManyExtents; SessionLost if `session`, in which the
        change was prepared, is no longer the mount's."""
        if session is not None and session is not self.session:
            raise SessionLost("the change was prepared in a session that has been lost")
        self.session.fates.begin(ino)
        scope = self._scope()
        source = self._locations.get(change.cloned_from) if change.cloned_from else None
        operation = CommitBody(scope, ino, self._locations.get(ino), change, source)
        inode = await self._transactor.run(self.session, operation, time_ns=scope.now_ns, vies=True)
        self._body_memory.put(Body(inode, change.inline or b""))
        return inode

    async def put_values(
        self, values: Sequence[ValueWrite], session: Session | None = None
    ) -> tuple[int, list[Inode | None]]:
        """Change up to VALUES_MAX values at once (`ops/put_values.py`); the revision, and the files as they are then.

        One request if all are as this mount saw them last. Raises what PutValues does, RequestTooLarge; SessionLost if
        `session`, in which the bodies were stored, is no longer the mount's.
        """
        if session is not None and session is not self.session:
            raise SessionLost("the values were prepared in a session that has been lost")
        check_locations([value.location for value in values])
        # what is answered ahead of the store has no revision yet
        assert not self._options.write_back or all(value.expected in (None, ABSENT) for value in values)
        scope = self._scope()
        done = await self._transactor.run(self.session, PutValues(scope, values), time_ns=scope.now_ns)
        for value, inode in zip(values, done[1], strict=True):
            if inode is not None and value.body is not None:
                self._body_memory.put(Body(inode, value.body.inline or b""))
        return done

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

    def statistics(self) -> dict[str, dict[str, float]]:
        """Counters for `status`, by what they are of."""
        return {
            "delegations": {**self.delegations.statistics(), "reads_asked": self.asked},
            "seals": self.delegations.seals.statistics(),
            "locks": self.locks.statistics(),
            **self._transactor.statistics(),
        }

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

    `record` says who mounts; its session number is filled in. Raises NotFormatted, UnknownSite, SiteLeaving,
    StoreError.
    """
    keys = Keys(volume)
    asked = (Range(keys.superblock), Range(keys.site(site)))
    superblock, site_found = (await retry(lambda: store.txn((), asked), options.operation_deadline_s)).ranges
    assert superblock is not None and site_found is not None
    if not superblock.kvs:
        raise await absence(store, volume)
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
        nursery.start_soon(opened.delegations.seals.watch)
        await nursery.start(opened.serve, record)
        await opened.warm_up()
        try:
            yield opened
        finally:
            nursery.cancel_scope.cancel()
