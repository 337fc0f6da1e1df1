"""Which opens the kernel serves by itself (passthrough), and what becomes of the local files behind them.

A file that is new, empty or truncated, and open nowhere else on this mount, is written by passthrough if it is opened
for writing alone: then no mapping can write to it, and nothing but the copy counts. While it is so, all its opens are;
all the others pass their mappings only: reads then see at once what other mounts commit.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.bodies import Bodies
from apollofs.fs.errors import BodyError, BodyUnavailable, StagingFailed, StagingFull
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.fs.passthrough import BackingDevice, Passthrough
from apollofs.fs.size_guess import SizeGuess
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
SEEN_BY_DAEMON = os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECT
POLL_S = 0.1
"""How often files that are being written are looked at for blocks to be stored."""


@dataclass(frozen=True, slots=True)
class Served:
    """How an open is to be served: the file, and the backing id if the kernel does it."""

    file: OpenFile
    backing_id: int = 0
    direct: bool = False
    """Whether its reads and writes come to the daemon all the same."""


class Passing:
    """The policy of one mount. `modes` says what the kernel has open how."""

    def __init__(self, bodies: Bodies) -> None:
        self.modes = Passthrough(wanted=bodies.wants_passthrough)
        self.guess = SizeGuess()
        self._bodies = bodies

    def attach(self, device: BackingDevice, *, negotiated: bool) -> None:
        """The mount answers: from now on local files are passed through, if the kernel takes one for a trial."""
        try:
            with tempfile.TemporaryFile(dir=self._bodies.staging_directory) as probe:
                self.modes.attach(device, negotiated, probe.fileno())
        except OSError as exc:
            log.warning("passthrough is not used: the cache directory can't be written: %s", exc)

    def open(self, file: OpenFile, flags: int, directory: int = 0) -> Served:
        """Decide on an open that the bodies have counted; `directory`: where the file was just made, or 0. No
        checkpoint; `close` must follow. BodyLost: the file was written here and has lost its session."""
        if isinstance(file, PassedFile):
            file.check_usable()
            return self._pass(file, flags)
        if self._is_for_writing(file, flags, directory):
            try:
                passed = self._bodies.pass_through(file)
            except (StagingFull, StagingFailed) as exc:
                log.warning("a file is written through the daemon: %s", exc)
            else:
                try:
                    return self._pass(passed, flags)
                except BodyUnavailable as exc:
                    log.warning("a file is written through the daemon: %s", exc)
                    file = self._bodies.take_back(passed)
        self.modes.opened_ordinary(file.ino)
        return Served(file)

    def _is_for_writing(self, file: OpenFile, flags: int, directory: int) -> bool:
        if not self.modes.available or not self._bodies.passes_writes or self.guess.is_small(directory):
            return False
        if flags & os.O_ACCMODE != os.O_WRONLY or flags & SEEN_BY_DAEMON or file.orphaned:
            return False
        if file.size_bytes or file.is_dirty:
            return False
        if self.modes.is_ordinary(file.ino) or self._bodies.opens(file.ino) != 1:
            self.modes.refused += 1
            return False
        return True

    def _pass(self, file: PassedFile, flags: int) -> Served:
        try:
            backing_id = self.modes.opened(file.ino, file.copy.fd)
        except OSError as exc:
            raise BodyUnavailable(f"the kernel takes no backing file: {exc.strerror}") from exc
        seen = flags & SEEN_BY_DAEMON or flags & os.O_ACCMODE != os.O_WRONLY
        return Served(file, backing_id, direct=bool(seen))

    def close(self, file: OpenFile, *, passing: bool, directory: int = 0) -> None:
        """An open has ended, and all that it wrote is committed, or failed to be."""
        if directory:
            self.guess.note(directory, file.size_bytes)
        if passing:
            self.modes.closed(file.ino)
        else:
            self.modes.closed_ordinary(file.ino)

    async def upload_early(self) -> None:
        """Store what has been written behind the front of files that grow; until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(POLL_S)
                for file in self._bodies.passed_files:
                    for upload in file.ready_uploads():
                        nursery.start_soon(_try, upload)


async def _try(upload: Callable[[], Awaitable[bool]]) -> None:
    """Errors are told by the commit, which tries again."""
    try:
        await upload()
    except (BodyError, BlobStoreError, MetadataError) as exc:
        log.info("a block could not be stored ahead of its commit: %s", exc)
