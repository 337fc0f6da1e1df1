"""The daemon's side of the guard (`guard.py`): starts it, starts another where it was killed, and lets it end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from apollofs.fs.guard import GuardOptions
from apollofs.fs.page_table import PageTable
from apollofs.fs.user_error import UserError
from apollofs.fs.wire_device import Device

log = logging.getLogger(__name__)
LEAD = 0.1
"""Which part of the lease before its end the guard begins to drop pages."""
AGAIN_AFTER_S = 1.0
END_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class Guarded:
    """What the guard of a mount has to know."""

    mountpoint: str
    device: str
    lease_ttl_s: int
    names: bool


class Guarding:
    """The guard of one mount. `table` is filled by who opens files and renews the lease."""

    def __init__(self, table: PageTable, device: Device, guarded: Guarded) -> None:
        self._table = table
        self._device = device
        self._guarded = guarded
        self._pid: int | None = None

    def facts(self) -> Mapping[str, int | bool]:
        """For `status`."""
        return {
            "running": self._pid is not None,
            "pid": self._pid or 0,
            "files": len(self._table),
            "drops": self._table.drops,
        }

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a guard running until cancelled. Cancel it when the daemon has let go of its connection, or lets go of
        it at the same time: the guard keeps it alive until its end. Raises UserError where the first can't start."""
        try:
            await self._run_one(task_status)
        except OSError as exc:
            raise UserError(f"the guard of {self._guarded.mountpoint} can't be started: {exc}") from exc
        while True:
            await trio.sleep(AGAIN_AFTER_S)
            try:
                await self._run_one(trio.TASK_STATUS_IGNORED)
            except OSError as exc:
                log.error("no new guard of %s yet: %s", self._guarded.mountpoint, exc)

    async def _run_one(self, task_status: trio.TaskStatus[None]) -> None:
        """From its start to its end. Raises OSError where it does not get ready."""
        process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if await process.stdout.receive_some(1) != b"r":
                raise OSError(f"it ended with status {await process.wait()}")
            self._pid = process.pid
            log.info("process %d guards %s", process.pid, self._guarded.mountpoint)
            task_status.started()
            status = await process.wait()
            log.error("the guard of %s ended with status %d; another is started", self._guarded.mountpoint, status)
        finally:
            self._pid = None
            await trio.aclose_forcefully(process.stdin)
            await trio.aclose_forcefully(process.stdout)
            with trio.move_on_after(END_DEADLINE_S, shield=True):
                await process.wait()

    async def _start(self) -> trio.Process:
        fuse_fd = self._device.clone()
        guarded = self._guarded
        options = GuardOptions(
            fuse_fd=fuse_fd,
            table_fd=self._table.fd,
            lead_s=LEAD * guarded.lease_ttl_s,
            device=guarded.device,
            mountpoint=guarded.mountpoint,
            names=guarded.names,
        )
        try:
            return await trio.lowlevel.open_process(
                [sys.executable, "-P", "-m", "apollofs.fs.guard", options.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(fuse_fd, self._table.fd),
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(fuse_fd)
