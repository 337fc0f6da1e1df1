"""Bodies: everything of a mount that has to do with the bytes of files, put together; and the open files.

async with open_bodies(volume, config, open_store) as bodies:
    file = await bodies.open(ino)           # counted: one open file for each inode, whoever opens it
    ...
    bodies.release(file)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blobs import BlobSource, OpenStore, open_blob_source
from apollofs.fs.cache import BlockCache
from apollofs.fs.cache_orders import CacheOrders, PinVolume
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyError
from apollofs.fs.images import Image, ImageStore, Scrub, is_large
from apollofs.fs.mount_sites import MountSites
from apollofs.fs.neighbours import Neighbours, NeighbourVolume
from apollofs.fs.open_file import BodyTools, OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.fs.reader import Reader
from apollofs.fs.room import Room
from apollofs.fs.staging import StagingArea, open_staging
from apollofs.fs.stored_blocks import BlockUploads
from apollofs.fs.upload_limit import UploadLimit
from apollofs.fs.working_copy import WorkingCopy
from apollofs.fs.writer import BodyVolume, Writer
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.placement import Placement
from apollofs.metadata.records import Body, Inode

log = logging.getLogger(__name__)
COMMITS_MAX = 16
"""Files that are committed side by side in the background and by `commit_all`."""
RETIRE_FIRST_S, RETIRE_MAX_S = 0.01, 5.0
"""Pauses between looks at a working copy that a process still has mapped."""
CLOSING_S, CLOSING_POLL_S = 0.05, 0.001
"""How long an open waits at most for the release that follows a close(2), and how often it looks."""


class MountVolume(BodyVolume, NeighbourVolume, PinVolume, Protocol):
    """What bodies ask of `metadata.volume.Volume`."""


class Bodies:
    """Made by `open_bodies`."""

    def __init__(
        self,
        volume: MountVolume,
        config: BodyConfig,
        source: BlobSource,
        cache: BlockCache,
        images: ImageStore,
        orders: CacheOrders,
        staging: StagingArea,
        nursery: trio.Nursery,
        sites: MountSites,
    ) -> None:
        self.cache = cache
        self.images = images
        self.reader = Reader(cache, images, config, source.block_bytes)
        self.orders = orders
        self._neighbours = Neighbours(volume, self.reader, nursery)
        self._sites = sites
        copies = sites.commit_copies(source)
        self._uploads = UploadLimit(config.uploads_max)
        self.writer = Writer(volume, source, cache, self.reader, self._uploads, nursery, copies)
        uploads = BlockUploads(source, self._uploads)
        self._tools = BodyTools(volume, self.reader, self.writer, staging, uploads, config, copies, set())
        self._nursery = nursery
        self._volume = volume
        self._interval_s = config.commit_interval_s
        self._files: dict[int, OpenFile] = {}
        self._opens: dict[int, int] = {}
        self._opening: Counter[int] = Counter()
        """Inodes whose body is being read for an open file that is not there yet."""
        self._held: Counter[int] = Counter()
        """Inodes whose open file is used by what has no handle of it."""
        self._failing: set[int] = set()
        self._retiring: set[int] = set()
        self.renewing: Callable[[OpenFile], AbstractContextManager[OpenFile]] = contextlib.nullcontext
        """Asked for a file that is about to be brought up to date: `passing.py` may make another object of it."""
        self.forgotten: Callable[[int], None] = lambda _: None
        """Told of each inode that is not open here any more."""

    # -- open files --------------------------------------------------------------------------------------------------

    def find(self, ino: int) -> OpenFile | None:
        """The open file of an inode, if it is open here (or still has uncommitted bytes)."""
        return self._files.get(ino)

    @contextlib.contextmanager
    def held(self, ino: int) -> Iterator[OpenFile | None]:
        """As `find`, for who has no handle and waits for something: the file is not forgotten before the block ends,
        even if its last handle is closed. It may become another object."""
        file = self._files.get(ino)
        if file is None:
            yield None
            return
        self._held[ino] += 1
        try:
            yield file
        finally:
            self._held[ino] -= 1
            if not self._held[ino]:
                del self._held[ino]
            if ino in self._files:
                self._forget_if_unused(self._files[ino])

    async def open(self, ino: int) -> OpenFile:
        """The inode's open file, as of now; `release` must follow. One request.

        Raises what `Volume.read_body` does.
        """
        self._opening[ino] += 1
        try:
            body = await self._volume.read_body(ino)
            file = self.open_known(body)
        finally:
            self._opening[ino] -= 1
            if not self._opening[ino]:
                del self._opening[ino]
        try:
            return await self.refresh(file, body.inode, body)
        except BaseException:
            self.release(self._files[ino])
            raise

    async def refresh(self, file: OpenFile, inode: Inode, body: Body | None = None) -> OpenFile:
        """As `OpenFile.refresh`; the file may be another object after that."""
        if inode.body_version <= file.version:
            await file.refresh(inode, body)
            return file
        with self.renewing(file) as renewed:
            await renewed.refresh(inode, body)
            return renewed

    def open_known(self, body: Body) -> OpenFile:
        """As `open`, of a body that was just read, or of an inode that was just created. No request."""
        ino = body.inode.ino
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = OpenFile(self._tools, body)
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return file

    def will_read(self, file: OpenFile) -> None:
        """The file was opened for reading: begin to fetch it if it is small, and what is probably opened next. No
        checkpoint; raises nothing."""
        body = file.body
        self._sites.will_read(body.inode, self._nursery)
        if body.inode.extents and not is_large(body):
            self.reader.opened(body)
            self._neighbours.opened(file.ino)
        elif body.inode.is_inline:
            self._neighbours.opened(file.ino)

    def release(self, file: OpenFile) -> None:
        """A handle is closed. After the last one the file is forgotten, unless it has uncommitted bytes: those are
        tried again in the background until they are committed. Commits nothing itself; no checkpoint."""
        self._opens[file.ino] -= 1
        self._forget_if_unused(file)

    def _forget_if_unused(self, file: OpenFile) -> None:
        if not self._is_unused(file):
            return
        if isinstance(file, PassedFile) and not file.copy.is_released():
            if file.ino not in self._retiring:
                self._retiring.add(file.ino)
                self._nursery.start_soon(self._retire, file)
            return
        del self._files[file.ino]
        self._opens.pop(file.ino, None)
        self._failing.discard(file.ino)
        self.reader.forget(file.ino)
        if isinstance(file, PassedFile):
            self._adopt(file)
        file.close()
        self.forgotten(file.ino)

    def _is_unused(self, file: OpenFile) -> bool:
        if self._opens.get(file.ino, 0) or file.ino in self._held:
            return False
        return not file.is_dirty and self._files.get(file.ino) is file

    # -- files that the kernel writes --------------------------------------------------------------------------------

    def spawn(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run it in the background, until it ends or the mount does. It may raise nothing."""
        self._nursery.start_soon(work, *arguments)

    @property
    def wants_passthrough(self) -> bool:
        return self._tools.config.passthrough

    @property
    def staging_directory(self) -> str:
        return self._tools.staging.directory

    @property
    def passes_writes(self) -> bool:
        """Whether the local disk can take files whose growth nobody sees."""
        try:
            return self._tools.staging.has_room
        except BodyError:
            return False

    async def keep_room(self) -> None:
        """See `StagingArea.keep_room`."""
        await self._tools.staging.keep_room()

    def opens(self, ino: int) -> int:
        """How many handles the inode has here."""
        return self._opens.get(ino, 0)

    @property
    def passed_files(self) -> list[PassedFile]:
        return [file for file in self._files.values() if isinstance(file, PassedFile)]

    @property
    def growing_files(self) -> list[OpenFile]:
        """Those that may have blocks to be stored before their commit."""
        return [*self._tools.growing, *self.passed_files]

    def pass_through(self, file: OpenFile) -> PassedFile:
        """The same file, empty, unwritten and with one handle that is being made, as one with a working copy.

        Raises StagingFull, StagingFailed.
        """
        assert self._files[file.ino] is file and self._opens[file.ino] == 1
        return self._replace(file, self._open_copy(file))

    def make_private(self, file: OpenFile, image: Image) -> PassedFile:
        """The same file, unwritten, with its image as the working copy: what is to be changed in place.

        Raises StagingFull, StagingFailed; BlockingIOError where others on this host use the image.
        """
        copy = self._open_copy(file, image.path)
        try:
            if not os.path.samestat(os.fstat(copy.fd), os.fstat(image.fd)):
                # what the kernel goes on to read and write has no name any more: another file was put in its place
                raise BlockingIOError(errno.EAGAIN, "the image was replaced by another one", image.path)
            self.images.detach(image)
        except OSError:
            copy.close()
            raise
        passed = self._replace(file, copy)
        passed.refer_to_all([image.footer(index) for index in range(image.blocks)])
        return passed

    def _open_copy(self, file: OpenFile, image: str | None = None) -> WorkingCopy:
        return self._tools.staging.open_copy(file.ino, self._volume.place_of(file.ino), image)

    def _replace(self, file: OpenFile, copy: WorkingCopy) -> PassedFile:
        passed = self._files[file.ino] = PassedFile(self._tools, file.body, copy)
        passed.errors = file.errors
        self.reader.forget(file.ino)
        file.close()
        return passed

    def take_back(self, passed: PassedFile) -> OpenFile:
        """The kernel did not take the working copy: the file, still empty, is written through the daemon."""
        file = self._files[passed.ino] = OpenFile(self._tools, passed.body)
        passed.close()
        return file

    def _adopt(self, file: PassedFile) -> None:
        """What was written here need not be fetched to be read here: the copy becomes the body's image."""
        footers = file.footers()
        if file.orphaned or file.is_lost or footers is None or not is_large(file.body):
            return
        try:
            self.images.adopt(file.copy.path, file.body, footers)
        except OSError as exc:
            log.warning("what was written can't be kept in the cache: %s", exc)

    async def let_close(self, ino: int) -> None:
        """A file that was written by passthrough is to be opened: if it was closed just now, let the kernel's release
        come first, for a moment. Who opens it before that would be served through the daemon until he closes it."""
        file = self._files.get(ino)
        if not isinstance(file, PassedFile):
            return
        until_s = trio.current_time() + CLOSING_S
        while isinstance(file, PassedFile) and not file.is_dirty and trio.current_time() < until_s:
            if trio.current_time() - file.closing_since_s > CLOSING_S and self._opens.get(ino, 0):
                return
            await trio.sleep(CLOSING_POLL_S)
            self._forget_if_unused(file)
            file = self._files.get(ino)

    async def _retire(self, file: PassedFile) -> None:
        """Wait until no process has the copy mapped any more; commit what was still written to it, and forget it."""
        pause_s = RETIRE_FIRST_S
        while self._is_unused(file) and not file.copy.is_released():
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETIRE_MAX_S)
        self._retiring.discard(file.ino)
        # what is dirty by now is committed, and forgotten, in the background
        self._forget_if_unused(file)

    def session_lost(self) -> None:
        """To be called (`Volume.session_lost_hooks`) before the next session begins."""
        for file in list(self._files.values()):
            file.session_lost()
            self._forget_if_unused(file)

    @property
    def inodes(self) -> list[int]:
        """Those that are open here, or still have uncommitted bytes."""
        return list(self._files)

    def in_use(self, inos: Sequence[int]) -> dict[int, int]:
        """Those of these inodes that are used here, each with the oldest body_version that may still be read: what the
        collector must leave. A read that began before a newer body was known reads again (`OpenFile.read`)."""
        found = {ino: file.version_in_use for ino in inos if (file := self._files.get(ino)) is not None}
        found.update((ino, 0) for ino in inos if ino in self._opening)
        return found

    @property
    def dirty_files(self) -> list[OpenFile]:
        return [file for file in self._files.values() if file.is_dirty]

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "open_files": len(self._files),
            "dirty_files": len(self.dirty_files),
            "working_copies": len(self.passed_files),
            "cache_bytes": self.cache.bytes_used + self.images.bytes_used,
            "cache_hits": self.cache.hits,
            "cache_fetched": self.cache.fetched,
            "image_blocks_fetched": self.images.fetched_blocks,
            "files_fetched_ahead": self._neighbours.fetched,
            "uploads_at_once": self._uploads.now,
            "packs": self.writer.packer.packs,
            "packed_files": self.writer.packer.packed,
        }

    def close(self) -> None:
        """Give up what is staged; nobody may be using a file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    # -- committing --------------------------------------------------------------------------------------------------

    async def commit_all(self) -> None:
        """Commit every file that was written (sync, umount). Raises the first error, after all were tried."""
        errors: list[Exception] = []
        await self._commit(self.dirty_files, errors)
        if errors:
            raise errors[0]

    async def write_back(self) -> None:
        """Commit files `commit_interval_s` after they were first written, again and again; until cancelled."""
        while True:
            await trio.sleep(self._interval_s / 2)
            now = trio.current_time()
            due = [
                file
                for file in self.dirty_files
                if file.dirty_since_s is not None and now - file.dirty_since_s >= self._interval_s / 2
            ]
            await self._commit(due, [])

    async def _commit(self, files: list[OpenFile], errors: list[Exception]) -> None:
        waiting = iter(files)

        async def worker() -> None:
            for file in waiting:
                try:
                    await file.commit()
                except (BodyError, MetadataError, BlobStoreError) as exc:
                    errors.append(exc)
                    if self._fails_anew(file):
                        log.error("inode %#x could not be committed and is tried again: %s", file.ino, exc)
                except Exception as exc:
                    # a bug in one file's commit must not end the mount
                    errors.append(exc)
                    if self._fails_anew(file):
                        log.exception("inode %#x could not be committed and is tried again", file.ino)
                else:
                    self._failing.discard(file.ino)
                self._forget_if_unused(file)

        async with trio.open_nursery() as nursery:
            for _ in range(min(COMMITS_MAX, len(files))):
                nursery.start_soon(worker)

    def _fails_anew(self, file: OpenFile) -> bool:
        """Whether it is to be told: once for each file that fails, until it has been committed."""
        is_new = file.ino not in self._failing
        self._failing.add(file.ino)
        return is_new


@contextlib.asynccontextmanager
async def open_bodies(
    volume: MountVolume, config: BodyConfig, open_store: OpenStore, placement: Placement | None = None
) -> AsyncIterator[Bodies]:
    """Bodies of a mounted volume; `open_store` opens a site's store by the site's id, at its first use.

    At the end nothing is committed any more: `commit_all` comes before. Raises CacheDirectoryUnusable.
    """
    cache_dir = os.fspath(config.cache_dir)
    sites = MountSites(placement, volume.superblock.block_bytes)
    async with (
        open_staging(cache_dir, config.disk_free_bytes_min) as staging,
        open_blob_source(
            open_store, volume.superblock.block_bytes, sites.here, sites.copies_of, sites.arrivals
        ) as source,
        contextlib.AsyncExitStack() as last,
        trio.open_nursery() as nursery,
    ):
        room, downloads = Room(config.cache_bytes_max), trio.CapacityLimiter(config.downloads_max)
        cache = BlockCache(source, room, downloads, config, os.path.join(staging.directory, "cache"), nursery)
        images = ImageStore(source, cache, room, downloads, config, nursery)
        last.callback(images.close)
        await cache.start()
        await images.start()
        orders = CacheOrders(volume, cache, images, room, config, source.block_bytes)
        await orders.start()
        staging.make_room = cache.make_room
        bodies = Bodies(volume, config, source, cache, images, orders, staging, nursery, sites)
        # Only when the nursery's tasks have ended is nobody reading what is staged.
        last.callback(bodies.close)
        nursery.start_soon(bodies.write_back)
        nursery.start_soon(source.prepare)
        nursery.start_soon(Scrub(images).serve)
        nursery.start_soon(orders.keep_up)
        try:
            yield bodies
        finally:
            nursery.cancel_scope.cancel()
