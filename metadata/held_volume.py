"""A volume that is held by a session: how that begins, is lost and followed by the next, and ends; and how an operation
runs in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

import trio

from apollofs.metadata import codec
from apollofs.metadata.delegations import Delegations
from apollofs.metadata.errors import (
    DeadlineExceeded,
    MetadataError,
    NotFormatted,
    SessionLost,
    UnknownSite,
)
from apollofs.metadata.fates import Fate
from apollofs.metadata.inbox import Inbox
from apollofs.metadata.keys import Keys
from apollofs.metadata.locks import LockManager
from apollofs.metadata.ops.common import Scope
from apollofs.metadata.placement import Placement
from apollofs.metadata.records import (
    MountRecord,
    SiteRecord,
    Superblock,
)
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.session_opening import open_session
from apollofs.metadata.store import Range, Store
from apollofs.metadata.transact import Operation, Transactor
from apollofs.metadata.usage import UsageKeeper
from apollofs.metadata.use_answers import UseAnswers
from apollofs.metadata.value_history import ValueHistory
from apollofs.metadata.value_reader import ValueReader
from apollofs.metadata.view import Recollection

T = TypeVar("T")
log = logging.getLogger(__name__)
REOPEN_AFTER_S = 1.0
MEND_EVERY_S = 5.0
SETTLE_AGAIN_S = 0.05
CLOSE_S = 30.0
"""How long the end of a session waits for what was answered ahead of the store."""


class HeldVolume(ValueReader):
    """The part of a Volume that holds its session, and runs operations in it."""

    def __init__(
        self, store: Store, keys: Keys, superblock: Superblock, site: SiteRecord, options: SessionOptions
    ) -> None:
        recollection = Recollection()
        delegations = Delegations(
            store,
            keys,
            enabled=options.delegations,
            write_back=options.write_back,
            wait_s=options.lease_ttl_s + options.operation_deadline_s,
        )
        transactor = Transactor(store, keys, recollection, delegations, options.operation_deadline_s)
        super().__init__(keys, transactor, recollection, delegations)
        self._store = store
        self._options = options
        self.superblock = superblock
        self.site = site
        self._session: Session | None = None
        self._usage = UsageKeeper(self._transactor, keys)
        self.locks = LockManager(store, keys, options, delegations.inbox, delegations.turns.end_all)
        self._own_inbox = None if options.delegations else Inbox(store, keys)
        self.uses = UseAnswers(store, keys, self._own_inbox or delegations.inbox)
        """Tells the collector what is open here."""
        self.history = ValueHistory(store, keys, options.operation_deadline_s)
        self.placement = Placement(store, keys, site.id, self)
        self._lease_hooks: list[Callable[[float], None]] = []
        self.session_lost_hooks: list[Callable[[], None]] = []
        """Called, without await, after a session has been lost and before the next one begins."""

    # -- session -----------------------------------------------------------------------------------------------------

    @property
    def proven(self) -> bool:
        """Whether the mount's lease can't have ended: what was read under it may still be as others see it."""
        return self._session is not None and self._session.proven

    def watch_lease(self, hook: Callable[[float], None]) -> None:
        """Have `hook` called, without await, with the time (`boot_time`) until which the lease is proven: now, and
        whenever that moves."""
        self._lease_hooks.append(hook)
        if self._session is not None:
            hook(self._session.proven_until)

    def _lease_proven(self, until: float) -> None:
        for hook in self._lease_hooks:
            hook(until)

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
            session.proven_hook = self._lease_proven
            self._lease_proven(session.proven_until)
            self.locks.begin(session)
            self.delegations.begin(session)
            if not started:
                started = True
                task_status.started()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._usage.keep, session)
                    nursery.start_soon(self.locks.serve)
                    nursery.start_soon(self.delegations.recalls.serve, session)
                    if self._options.delegations:
                        nursery.start_soon(self.delegations.serve, session)
                        nursery.start_soon(self.delegations.inbox.serve, session)
                    if self._own_inbox is not None:
                        nursery.start_soon(self._own_inbox.serve, session)
                    nursery.start_soon(self.uses.serve, session)
                    nursery.start_soon(self._mend_locks)
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
            await self.delegations.drop_above()
            for hook in self.session_lost_hooks:
                hook()
            if session.given_up:
                await session.close()

    async def _open_session(self, record: MountRecord, *, retry: bool) -> Session:
        while True:
            try:
                if retry:
                    await self._check_same_volume()
                session = await open_session(self._store, self._keys, self._options, record, self.site.id)
            except (NotFormatted, UnknownSite):
                raise
            except MetadataError as exc:
                if not retry:
                    raise
                log.error("no new session yet: %s", exc)
                await trio.sleep(REOPEN_AFTER_S)
                continue
            log.info("session %d begins on volume %s, site %s", session.number, self._keys.volume, self.site.name)
            return session

    async def _mend_locks(self) -> None:
        """Undo, as soon as the store answers, what lock calls that failed have left in it."""
        while True:
            await trio.sleep(MEND_EVERY_S)
            try:
                await self.locks.mend()
            except MetadataError as exc:
                log.info("locks are mended later: %s", exc)

    async def _check_same_volume(self) -> None:
        """Raises NotFormatted if the volume was destroyed, or made anew under the same name, meanwhile."""
        found = await self._store.range(Range(self._keys.superblock))
        if not found.kvs or codec.decode_superblock(found.kvs[0].value).uuid != self.superblock.uuid:
            raise NotFormatted(f"volume {self._keys.volume!r} has been destroyed while it was mounted")

    async def _close_session(self, session: Session) -> None:
        with trio.CancelScope(shield=True):
            if session.alive:
                with trio.move_on_after(CLOSE_S):
                    await self.delegations.ahead.finish(session)
                with trio.move_on_after(5), contextlib.suppress(MetadataError):
                    await self._usage.flush(session)
                    await self.delegations.seals.leave(session)
            self.delegations.end()
            await self.locks.close()
            await session.close()

    def _scope(self) -> Scope:
        return Scope(self._keys, self._transactor.moment(self.session))

    async def transact(self, make: Callable[[Scope], Operation[T]]) -> T:
        """Run one operation in the mount's session. One request."""
        scope = self._scope()
        return await self._transactor.run(self.session, make(scope), time_ns=scope.now_ns)

    async def settle(self) -> None:
        """On return everything that was answered before is in the store. No request, and no checkpoint, if it is.

        Raises SessionLost, DeadlineExceeded.
        """
        await self.delegations.ahead.settled()

    async def out_of_doubt(self) -> None:
        """On return no transaction of this mount that was given up before can be applied any more: `fate_of`, and what
        is read from now on, tell what became of it. No request if there is none. SessionLost, DeadlineExceeded."""
        session = self.session
        await self.settle()
        with trio.move_on_after(self._options.operation_deadline_s):
            while session.in_doubt:
                await session.settle()
                if not session.alive:
                    raise SessionLost("the session has ended before it was known what was done", in_doubt=True)
                if session.in_doubt:
                    await trio.sleep(SETTLE_AGAIN_S)
            return
        raise DeadlineExceeded("metadata store: it can't be told what became of an earlier operation")

    def fate_of(self, ino: int) -> Fate | None:
        """What became of the last `commit_body` of a file (`Fates.of`). Raises SessionLost."""
        return self.session.fates.of(ino)

    @property
    def losses(self) -> int:
        """How often a lost session took answered operations with it."""
        return self.delegations.ahead.losses
