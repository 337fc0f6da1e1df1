"""The mount's daemon: connects, opens the volume and the blob stores, mounts, serves, and ends cleanly.

One long-lived nursery holds everything. How it ends:

- `umount` from outside, or asked through the control socket: the kernel has handed everything over; what is not yet
  committed is committed, the session is given back, the process ends;
- SIGTERM or SIGINT: the same, after unmounting by itself; a mount that is busy, or lives on elsewhere (a bind mount, a
  container), is detached, once all that was written so far is committed. What another mount has put at the mountpoint
  meanwhile stays. A second signal ends the process at once, detached but uncommitted;
- the volume was destroyed, or a bug ended the loop: detached, an error in the log, exit status 1.

A lost session does not end it: the Volume drops its locks and uncommitted writes and opens a new one.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import trio

from apollofs.fs.assembly import Assembly, assembled
from apollofs.fs.cache_answers import cache_handlers
from apollofs.fs.control import ControlServer, Handler, prepare_runtime_dir, socket_path
from apollofs.fs.daemon import Readiness
from apollofs.fs.exporter import exported
from apollofs.fs.fuse_session import FuseOptions, FuseSession
from apollofs.fs.guarding import Guarded, Guarding
from apollofs.fs.inspection import inspect_inode
from apollofs.fs.lease_end import LeaseEnd
from apollofs.fs.mount_config import MountConfig
from apollofs.fs.mountinfo import place_of
from apollofs.fs.page_table import PageTable
from apollofs.fs.unmounting import MountBusy, sync_filesystem, unmount
from apollofs.fs.user_error import UserError, leaves
from apollofs.fs.wire_constants import InitFlag

log = logging.getLogger(__name__)

LINGER_S = 5.0
"""How long the last answers of the control socket may take when everything else has ended."""


async def serve_mount(config: MountConfig, readiness: Readiness) -> None:
    """Run one mount to its end. Returns when it has ended cleanly, with everything committed.

    Raises UserError, and the errors of metadata and blob store, when it can't start; UserError when what was written
    could not be committed at the end.
    """
    prepare_runtime_dir(config.runtime_dir)
    # who opens a file on which a lease is being tried (`working_copy.py`) makes the kernel send it
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    obedience = Obedience()
    async with trio.open_nursery() as nursery:
        await nursery.start(obedience.serve)
        with trio.CancelScope() as starting:
            starting.deadline = trio.current_time() + config.start_deadline_s
            obedience.obey(starting.cancel)
            async with assembled(config) as assembly, _mounted(config, assembly) as running:
                await running.confirm_answering()
                starting.deadline = float("inf")
                obedience.obey(lambda: nursery.start_soon(running.stop), then=running.detach_now)
                await running.serve(readiness)
        nursery.cancel_scope.cancel()
    if starting.cancelled_caught:
        why = f"{obedience.heard} came first" if obedience.heard else f"{config.start_deadline_s:g} s were not enough"
        raise UserError(f"the mount is not ready: {why}")


class Obedience:
    """What SIGTERM and SIGINT do: the first one ends things in order, a second one at once."""

    def __init__(self) -> None:
        self.heard = ""
        """The name of the first signal; empty while there was none."""
        self._first: Callable[[], object] = lambda: None
        self._second: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    def obey(self, first: Callable[[], object], then: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint) -> None:
        """From now on the first signal calls `first`; one after that awaits `then`, and the process ends."""
        self._first, self._second = first, then

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                if self.heard:
                    log.error("%s: ending at once; what was not committed is lost", name)
                    with trio.move_on_after(1, shield=True):
                        await self._second()
                    logging.shutdown()
                    os._exit(1)
                log.info("%s: ending", name)
                self.heard = name
                self._first()


@asynccontextmanager
async def _mounted(config: MountConfig, assembly: Assembly) -> AsyncIterator[RunningMount]:
    """Mount, answer requests while the context lasts, and leave nothing mounted behind."""
    options = FuseOptions(
        volume=config.access.url.volume,
        read_only=config.read_only,
        allow_other=config.allow_other,
        kernel=config.kernel_options,
    )
    session = FuseSession(assembly.operations, assembly.wire, config.mountpoint, options)
    async with trio.open_nursery() as watchers:
        session.mount()
        try:
            lease_end = LeaseEnd(assembly.filesystem.open_inodes, session.wire.device.invalidate_pages)
            assembly.volume.watch_lease(lease_end.prove)
            watchers.start_soon(lease_end.serve)
            guarding = await _guarded(config, assembly, session, watchers) if config.guard else None
            async with trio.open_nursery() as nursery:
                running = RunningMount(config, assembly, session, guarding)
                nursery.start_soon(running.serve_requests)
                try:
                    yield running
                finally:
                    session.terminate()
                    # close() comes after the loop has returned, also when all this is cancelled
                    with trio.CancelScope(shield=True), trio.move_on_after(LINGER_S):
                        await running.gone.wait()
        finally:
            session.close()
            watchers.cancel_scope.cancel()


async def _guarded(config: MountConfig, assembly: Assembly, session: FuseSession, nursery: trio.Nursery) -> Guarding:
    """Start the guard of a mount that answers nobody yet. Raises UserError."""
    table = PageTable()
    facts = Guarded(config.mountpoint, session.device, config.session.lease_ttl_s, config.session.entry_cache)
    guarding = Guarding(table, session.wire.device, facts)
    assembly.volume.watch_lease(table.prove)
    assembly.filesystem.page_watch = table
    await nursery.start(guarding.serve)
    return guarding


class RunningMount:
    """A mount that answers requests; `serve` runs it to its end."""

    def __init__(
        self, config: MountConfig, assembly: Assembly, session: FuseSession, guarding: Guarding | None
    ) -> None:
        self._config = config
        self._assembly = assembly
        self._session = session
        self._guarding = guarding
        self._started_s = time.time()
        self._commit_error: str | None = None
        self.gone = trio.Event()
        """The kernel will send no more requests."""
        self._committed = trio.Event()
        """The last commit was tried; `_commit_error` says how it went."""

    async def serve_requests(self) -> None:
        """The FUSE loop."""
        try:
            await self._session.serve()
        finally:
            self._assembly.filesystem.passing.modes.detach()
            self.gone.set()

    async def confirm_answering(self) -> None:
        """Wait until the mount answers a process."""
        await trio.to_thread.run_sync(os.stat, self._config.mountpoint, abandon_on_cancel=True)
        negotiated = self._assembly.wire.negotiated()
        if negotiated is not None:
            filesystem = self._assembly.filesystem
            filesystem.maps_direct = InitFlag.DIRECT_IO_ALLOW_MMAP in negotiated.flags
            filesystem.passing.attach(self._assembly.wire.device, negotiated=InitFlag.PASSTHROUGH in negotiated.flags)

    async def serve(self, readiness: Readiness) -> None:
        """Say that the mount is ready, serve until it has gone, commit. Raises UserError if that fails."""
        path = socket_path(self._config.runtime_dir, self._session.device)
        control = ControlServer(path, self._handlers())
        await control.bind()
        async with self._exported(), trio.open_nursery() as nursery:
            nursery.start_soon(control.serve)
            log.info("volume %s is mounted at %s", self._config.access.url.volume, self._config.mountpoint)
            readiness.ready({"mountpoint": self._config.mountpoint, "pid": os.getpid()})
            await self.gone.wait()
            await self._commit_last()
            await control.drained(LINGER_S)
            nursery.cancel_scope.cancel()
        if self._commit_error is not None:
            raise UserError(self._commit_error)
        log.info("%s is unmounted; everything is committed", self._config.mountpoint)

    def _exported(self) -> AbstractAsyncContextManager[object]:
        config = self._config
        if config.metrics is None:
            return nullcontext()
        labels = {"volume": config.access.url.volume, "site": config.site, "mountpoint": config.mountpoint}
        return exported(config.metrics, self._counters, labels)

    def _counters(self) -> dict[str, Mapping[str, float]]:
        fuse = dict(self._session.statistics())
        return {"fuse_requests": fuse.pop("requests_by_kind"), "fuse": fuse, **self._assembly.statistics()}

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Commit what was written. Raises UserError with what could not be committed."""
        try:
            with trio.fail_after(self._config.stop_deadline_s):
                await self._assembly.filesystem.sync()
        except trio.TooSlowError as exc:
            raise UserError(f"not everything could be committed within {self._config.stop_deadline_s:g} s") from exc
        except Exception as exc:
            first = leaves(exc)[0]
            log.error("a commit of everything failed", exc_info=exc)
            raise UserError(f"not everything could be committed: {first or type(first).__name__}") from exc

    async def _commit_last(self) -> None:
        try:
            await self._commit()
        except UserError as exc:
            self._commit_error = str(exc)
        self._committed.set()

    async def _unmount(self, *, lazy: bool) -> None:
        """Raises MountBusy, UserError; also when the kernel does not come to an end in time."""
        with trio.move_on_after(self._config.stop_deadline_s) as scope:
            await self._take_away(lazy=lazy)
        if scope.cancelled_caught:
            raise UserError(f"{self._config.mountpoint} could not be unmounted in {self._config.stop_deadline_s:g} s")

    async def _take_away(self, *, lazy: bool) -> None:
        """Unmount what is at the mountpoint if that is this mount, and not another that has its place by now."""

        def work() -> None:
            # the device number of a mount that has gone is given to the next one at once
            if not self.gone.is_set() and self._session.in_place():
                unmount(self._config.mountpoint, lazy=lazy)

        await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def stop(self) -> None:
        """Unmount; what is busy is detached after a commit, and its users get errors."""
        try:
            await self._unmount(lazy=False)
            with trio.move_on_after(LINGER_S):
                await self.gone.wait()
                return
        except UserError as exc:
            log.warning("%s; it is detached", exc)
        try:
            with trio.move_on_after(self._config.stop_deadline_s):
                await trio.to_thread.run_sync(self._sync_kernel, abandon_on_cancel=True)
            await self._commit()
            await self._unmount(lazy=True)
        except (UserError, OSError) as exc:
            log.error("while detaching: %s", exc)
        self._session.terminate()

    def _sync_kernel(self) -> None:
        """Have the kernel hand over what it holds, by whichever way leads to this mount. Raises UserError, OSError."""
        place = place_of(self._session.device)
        if place is not None:
            sync_filesystem(place)

    async def detach_now(self) -> None:
        """Take it out of the tree, whatever is lost by that."""
        await self._take_away(lazy=True)

    # -- answers of the control socket -------------------------------------------------------------------------------

    def _handlers(self) -> Mapping[str, Handler]:
        return {
            "status": self._status,
            "sync": self._sync,
            "unmount": self._unmount_asked,
            "info": self._info,
            **cache_handlers(self._assembly.volume, self._assembly.filesystem.cache_orders),
        }

    async def _status(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        config, volume = self._config, self._assembly.volume
        return {
            "mountpoint": config.mountpoint,
            "volume": config.access.url.volume,
            "meta_url": str(config.access.url),
            "site": config.site,
            "blobs": self._assembly.location.url(),
            "pid": os.getpid(),
            "version": config.version,
            "since_s": self._started_s,
            "read_only": config.read_only,
            **self._assembly.session_facts(),
            "cache_dir": str(config.body.cache_dir),
            "volume_uuid": volume.superblock.uuid,
            "passthrough": self._assembly.filesystem.passing.modes.why_not or "in use",
            "guard": dict(self._guarding.facts()) if self._guarding is not None else {"running": False},
            "fuse": dict(self._session.statistics()),
            **{name: dict(counters) for name, counters in self._assembly.statistics().items()},
        }

    async def _sync(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        await self._commit()
        return {"pid": os.getpid()}

    async def _unmount_asked(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Commit, unmount, and answer when the last commit is done. A failed commit leaves it mounted."""
        lazy = bool(request.get("lazy"))
        await self._commit()
        try:
            await self._unmount(lazy=lazy)
        except MountBusy as exc:
            raise UserError(f"{exc}; --lazy detaches it anyway") from exc
        if not lazy:
            with trio.move_on_after(self._config.stop_deadline_s):
                await self._committed.wait()
            if self._commit_error is not None:
                raise UserError(self._commit_error)
        return {"pid": os.getpid(), "ended": self._committed.is_set()}

    async def _info(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with trio.fail_after(self._config.session.operation_deadline_s):
            return await inspect_inode(self._assembly, request)
