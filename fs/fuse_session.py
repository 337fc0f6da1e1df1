"""The life of one FUSE mount: wire hook, pyfuse3, fast loop, in the order that `wire.py` demands."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from apollofs.fs import fastloop
from apollofs.fs.mountinfo import FSNAME_PREFIX, has_mounts_below, mount_at
from apollofs.fs.operations import Operations
from apollofs.fs.user_error import UserError
from apollofs.fs.wire import Wire
from apollofs.fs.wire_constants import Opcode
from apollofs.fs.wire_load import pyfuse3

log = logging.getLogger(__name__)

WORKERS_MAX = 1024
"""Requests that are worked on at once: well above the kernel's `max_background`, since those of processes come on top.
One that waits costs some 25 KiB, and what it writes."""


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """What the kernel is told about the mount."""

    volume: str
    read_only: bool = False
    allow_other: bool = False
    kernel: tuple[str, ...] = ()
    """Flags of mount(2) by name, as nosuid; libfuse adds nosuid and nodev unless suid and dev are here."""

    def as_set(self) -> set[str]:
        """The options for pyfuse3.init."""
        options = {"default_permissions", f"fsname={FSNAME_PREFIX}{self.volume}", "subtype=apollofs", *self.kernel}
        if self.read_only:
            options.add("ro")
        if self.allow_other:
            options.add("allow_other")
        return options


class FuseSession:
    """One per process, as pyfuse3 has one. `mount`, then `serve`; `close` after that in any case."""

    def __init__(self, operations: Operations, wire: Wire, mountpoint: str, options: FuseOptions) -> None:
        """`wire` was made for the same operations, and they are guarded."""
        self._operations = operations
        self.wire = wire
        self._mountpoint = mountpoint
        self._options = options
        self._mounted = False
        self._device = ""
        self._serving = False
        self._loop: fastloop.FastLoop | None = None

    @property
    def device(self) -> str:
        """ "major:minor" of the mount; empty before it."""
        return self._device

    def mount(self) -> None:
        """Mount it; from now on the kernel queues requests. Raises UserError with what libfuse says."""
        said: list[str] = []
        try:
            with _captured_stderr(said):
                pyfuse3.init(self._operations, self._mountpoint, self._options.as_set())
        except RuntimeError as exc:
            why = "; ".join(said) or str(exc)
            raise UserError(f"{self._mountpoint} can't be mounted: {why}") from exc
        self._mounted = True
        entry = mount_at(self._mountpoint)
        self._device = entry.device if entry is not None else ""
        self.wire.verify_active()

    async def serve(self) -> None:
        """Answer requests until the mount has gone (umount) or `terminate` was called."""
        self._serving = True
        try:
            async with trio.open_nursery() as nursery:
                self.wire.start(nursery)
                self._loop = fastloop.install(self.wire.fd)
                references = self._operations.references
                self._operations.kernel.attach(self.wire.device, references.__contains__, self._has_submounts)
                nursery.start_soon(references.keep_bounded, self.wire.device.prune)
                if self._loop is not None:
                    await self._loop.serve(WORKERS_MAX, self.wire.interrupts.refuse_waiting)
                else:
                    await pyfuse3.main(1, WORKERS_MAX)
                # lock waits and the like have nobody left to answer
                nursery.cancel_scope.cancel()
        finally:
            self._serving = False
            self._operations.kernel.detach()
            if self._loop is not None:
                self._loop.uninstall()
                self._loop = None

    def _has_submounts(self) -> bool:
        return has_mounts_below(self._device)

    def terminate(self) -> None:
        """Have `serve` return, with requests that are being answered answered. Harmless when it does not serve."""
        if self._serving:
            pyfuse3.terminate()

    def close(self) -> None:
        """Let go of the kernel's side; unmounts what is still mounted (lazily). Idempotent."""
        if not self._mounted:
            return
        self._mounted = False
        self.wire.close()
        pyfuse3.close(unmount=self.in_place())

    def in_place(self) -> bool:
        """Whether it is this mount that is on top at its mountpoint: what is there by now may be another's."""
        entry = mount_at(self._mountpoint)
        return entry is not None and entry.device == self._device

    def statistics(self) -> Mapping[str, Any]:
        """Counters for `status`."""
        counts = self.wire.request_counts()
        return {
            "requests": sum(counts.values()),
            "requests_by_kind": {opcode.name.lower(): counts[opcode] for opcode in Opcode if opcode in counts},
            "inodes": len(self._operations.references),
            "handlers_at_work": self.wire.tasks,
            "bugs": self.wire.faults.bugs,
        }


@contextlib.contextmanager
def _captured_stderr(lines: list[str]) -> Iterator[None]:
    """libfuse and fusermount3 write their reasons to descriptor 2: collect them."""
    with tempfile.TemporaryFile() as catcher:
        kept = os.dup(2)
        os.dup2(catcher.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            catcher.seek(0)
            lines += [line.strip() for line in catcher.read(4096).decode(errors="replace").splitlines() if line.strip()]
