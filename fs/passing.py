"""Which opens the kernel serves by itself (passthrough), and what becomes of the local files behind them.

Writing. A file that is new, empty or truncated, and open nowhere else on this mount, is written by passthrough if it is
opened for writing alone: then no mapping can write to it, and nothing but the copy counts. While it is so, all its
opens are; those that read, and those whose writes the daemon must see (O_APPEND, O_SYNC), pass their mappings only, so
that what other mounts commit is seen at once.

Reading. A file whose image is all here and verified, and that nobody has changed for a moment, is read by passthrough.
If it is to be changed while it is read so, here or elsewhere, its image becomes a working copy, in the same local file:
that is what the kernel goes on to read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreError, hurried
from apollofs.fs.bodies import Bodies
from apollofs.fs.errors import BodyError, BodyUnavailable, ImageShared, StagingFailed, StagingFull
from apollofs.fs.images import Image, body_key, is_large
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.fs.passthrough import BackingDevice, Passthrough
from apollofs.fs.size_guess import SizeGuess
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
SEEN_BY_DAEMON = os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECT
CLEARED_BY_WRITING = stat.S_ISUID | stat.S_ISGID
"""Bits that a write takes away; past the daemon nobody would."""
EARLY_PAUSE_S = 0.25
"""What is stored ahead of a commit is given up rather than tried again after a longer pause;"""
EARLY_REST_S = 2.0
"""then nothing is for a while."""
POLL_S = 0.1
"""How often files that are being written are looked at for blocks to be stored."""
QUIET_NS = 1_000_000_000
"""A file that was changed a shorter time ago is read through the daemon: it may be changed again."""


@dataclass(frozen=True, slots=True)
class Served:
    """How an open is to be served: the file, and the backing id if the kernel does it."""

    file: OpenFile
    backing_id: int = 0
    direct: bool = False
    """Whether its reads and writes come to the daemon all the same."""


class Passing:
    """The policy of one mount. `modes` says what the kernel has open how; `on_replaced` is told when a file that has
    handles is another object from now on."""

    def __init__(self, bodies: Bodies, on_replaced: Callable[[OpenFile, OpenFile], None]) -> None:
        self.modes = Passthrough(wanted=bodies.wants_passthrough)
        self.guess = SizeGuess()
        self._bodies = bodies
        self._on_replaced = on_replaced
        self._images: dict[int, Image] = {}
        """By inode: what is read by passthrough, held."""
        self._in_change: Counter[int] = Counter()
        """Inodes whose body is being changed: nobody new may be shown what it was."""
        self._verifying: set[str] = set()
        self._early_from_s = 0.0
        bodies.renewing = self._renewing

    def attach(self, device: BackingDevice, *, negotiated: bool) -> None:
        """The mount answers: from now on local files are passed through, if the kernel takes one for a trial."""
        try:
            with tempfile.TemporaryFile(dir=self._bodies.staging_directory) as probe:
                self.modes.attach(device, negotiated, probe.fileno())
        except OSError as exc:
            log.warning("passthrough is not used: the cache directory can't be written: %s", exc)

    # -- opening -----------------------------------------------------------------------------------------------------

    async def image_for(self, file: OpenFile, flags: int) -> Image | None:
        """The image that an open may be served from, held for `open`, if all of it is here; None: there is none."""
        if not self._may_read(file, flags) or not self._bodies.images.find(file.body):
            return None
        image = await self._bodies.images.open(file.body)
        if image is not None and not image.trusted:
            self._verify(image)
            self._bodies.images.release(image)
            return None
        return image

    def _verify(self, image: Image) -> None:
        """Have it hashed, for a later open."""
        if image.is_complete and image.key not in self._verifying:
            self._verifying.add(image.key)
            self._bodies.images.hold(image)
            self._bodies.spawn(self._verify_whole, image)

    async def _verify_whole(self, image: Image) -> None:
        try:
            await image.verify()
        except BodyError as exc:
            log.info("an image could not be verified: %s", exc)
        finally:
            self._verifying.discard(image.key)
            self._bodies.images.release(image)

    def open(self, file: OpenFile, flags: int, directory: int = 0, image: Image | None = None) -> Served:
        """Decide on an open that the bodies have counted; `directory`: where the file was just made, or 0; `image`:
        from `image_for`. No checkpoint; `close` must follow.

        Raises BodyLost if the file was written here and has lost its session; BodyUnavailable; as `changing`.
        """
        try:
            return self._open(file, flags, directory, image)
        finally:
            if image is not None:
                self._bodies.images.release(image)

    def _open(self, file: OpenFile, flags: int, directory: int, image: Image | None) -> Served:
        if not isinstance(file, PassedFile) and self.modes.is_passing(file.ino):
            if flags & os.O_ACCMODE == os.O_RDONLY and not file.is_dirty:
                return Served(file, self._backing(file.ino, self._images[file.ino].fd))
            file = self._private(file)
        if isinstance(file, PassedFile):
            file.check_usable()
            return self._pass(file, flags)
        if image is not None and self._may_read(file, flags) and body_key(file.body) == image.key:
            return self._pass_image(file, image)
        if self._is_for_writing(file, flags, directory):
            try:
                file = self._bodies.pass_through(file)
            except (StagingFull, StagingFailed) as exc:
                log.warning("a file is written through the daemon: %s", exc)
            else:
                try:
                    return self._pass(file, flags)
                except BodyUnavailable as exc:
                    log.warning("a file is written through the daemon: %s", exc)
                    file = self._bodies.take_back(file)
        self.modes.opened_ordinary(file.ino)
        return Served(file)

    def _may_read(self, file: OpenFile, flags: int) -> bool:
        if not self.modes.available or flags & os.O_ACCMODE != os.O_RDONLY or isinstance(file, PassedFile):
            return False
        if self._in_change[file.ino]:
            return False
        body = file.body
        if file.is_dirty or file.orphaned or file.is_unsure or not is_large(body):
            return False
        if self.modes.is_ordinary(file.ino):
            self.modes.refused += 1
            return False
        return time.time_ns() - max(body.inode.mtime_ns, body.inode.ctime_ns) >= QUIET_NS

    def _is_for_writing(self, file: OpenFile, flags: int, directory: int) -> bool:
        if not self.modes.available or not self._bodies.passes_writes or self.guess.is_small(directory):
            return False
        if flags & os.O_ACCMODE != os.O_WRONLY or flags & SEEN_BY_DAEMON or file.orphaned:
            return False
        if file.size_bytes or file.is_dirty or file.inode.mode & CLEARED_BY_WRITING:
            return False
        if self.modes.is_ordinary(file.ino) or self._bodies.opens(file.ino) != 1:
            self.modes.refused += 1
            return False
        return True

    def _pass(self, file: PassedFile, flags: int) -> Served:
        seen = flags & SEEN_BY_DAEMON or flags & os.O_ACCMODE != os.O_WRONLY
        return Served(file, self._backing(file.ino, file.copy.fd), direct=bool(seen))

    def _pass_image(self, file: OpenFile, image: Image) -> Served:
        served = Served(file, self._backing(file.ino, image.fd))
        self._bodies.images.hold(image)
        self._images[file.ino] = image
        return served

    def _backing(self, ino: int, fd: int) -> int:
        try:
            return self.modes.opened(ino, fd)
        except OSError as exc:
            raise BodyUnavailable(f"the kernel takes no backing file: {exc.strerror}") from exc

    # -- what is read by passthrough and changes ---------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self, file: OpenFile) -> Iterator[OpenFile]:
        """Until the end of the block the file is changed: if it is read by passthrough, then from a working copy from
        now on, which is given; and nobody begins to read it so meanwhile.

        Raises ImageShared, StagingFull, StagingFailed.
        """
        with self._noted_change(file.ino):
            yield self._private(file)

    @contextlib.contextmanager
    def _noted_change(self, ino: int) -> Iterator[None]:
        self._in_change[ino] += 1
        try:
            yield
        finally:
            self._in_change[ino] -= 1
            if not self._in_change[ino]:
                del self._in_change[ino]

    def _private(self, file: OpenFile) -> OpenFile:
        image = self._images.get(file.ino)
        if image is None or isinstance(file, PassedFile):
            return file
        if not is_large(file.body) or body_key(file.body) != image.key:
            raise ImageShared(f"inode {file.ino:#x} is read as of an older version")
        try:
            passed = self._bodies.make_private(file, image)
        except BlockingIOError as exc:
            raise ImageShared(f"inode {file.ino:#x}: {exc.strerror}") from exc
        passed.has_readers = True
        self._release_image(file.ino)
        self._on_replaced(file, passed)
        return passed

    @contextlib.contextmanager
    def _renewing(self, file: OpenFile) -> Iterator[OpenFile]:
        """The file, while it is brought up to date. Where it can't be, its passthrough readers go on as before."""
        with self._noted_change(file.ino):
            try:
                file = self._private(file)
            except (ImageShared, StagingFull, StagingFailed) as exc:
                log.warning("readers of what they have open are not shown a change: %s", exc)
            yield file

    # -- closing -----------------------------------------------------------------------------------------------------

    def close(self, file: OpenFile, *, passing: bool, directory: int = 0) -> None:
        """An open has ended, and all that it wrote is committed, or failed to be."""
        if directory:
            self.guess.note(directory, file.size_bytes)
        if not passing:
            self.modes.closed_ordinary(file.ino)
            return
        self.modes.closed(file.ino)
        if not self.modes.is_passing(file.ino):
            self._release_image(file.ino)

    def _release_image(self, ino: int) -> None:
        image = self._images.pop(ino, None)
        if image is not None:
            self._bodies.images.release(image)

    @property
    def read_inodes(self) -> list[int]:
        """Inodes that are read by passthrough, as of some version: nothing but the daemon shows them a newer one."""
        return [*self._images, *(file.ino for file in self._bodies.passed_files if file.has_readers)]

    # -- in the background -------------------------------------------------------------------------------------------

    async def upload_early(self) -> None:
        """Store what has been written behind the front of files that grow; until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(POLL_S)
                if self._bodies.passed_files:
                    await self._bodies.keep_room()
                for file in self._bodies.growing_files:
                    if trio.current_time() < self._early_from_s:
                        break
                    with self._told_later():
                        for upload in await file.ready_uploads():
                            nursery.start_soon(self._try, upload)

    async def _try(self, upload: Callable[[], Awaitable[bool]]) -> None:
        # a commit that comes meanwhile must not wait behind long pauses between attempts
        with self._told_later(), hurried(EARLY_PAUSE_S):
            await upload()

    @contextlib.contextmanager
    def _told_later(self) -> Iterator[None]:
        """Errors are told by the commit, which tries again."""
        try:
            yield
        except (BodyError, BlobStoreError, MetadataError) as exc:
            log.info("a block could not be stored ahead of its commit: %s", exc)
        except Exception:
            # nor may a bug in it end the mount
            log.exception("a block could not be stored ahead of its commit")
        else:
            return
        self._early_from_s = trio.current_time() + EARLY_REST_S
