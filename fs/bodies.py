"""Bodies: everything of a mount that has to do with the bytes of files, put together; and the open files.

async with open_bodies(volume, config, open_store) as bodies:
    file = await bodies.open(ino)           # counted: one open file for each inode, whoever opens it
    ...
    bodies.release(file)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blobs import BlobSource, OpenStore, open_blob_source
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyError
from apollofs.fs.open_file import BodyTools, OpenFile
from apollofs.fs.reader import Reader
from apollofs.fs.staging import StagingArea, open_staging
from apollofs.fs.writer import BodyVolume, Writer
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.records import Body

log = logging.getLogger(__name__)
COMMITS_MAX = 16
"""Files that are committed side by side in the background and by `commit_all`."""


class Bodies:
    """Made by `open_bodies`."""

    def __init__(
        self,
        volume: BodyVolume,
        config: BodyConfig,
        source: BlobSource,
        cache: BlockCache,
        staging: StagingArea,
        nursery: trio.Nursery,
    ) -> None:
        self.cache = cache
        self.reader = Reader(cache, config, source.block_bytes)
        self.writer = Writer(volume, source, cache, self.reader, config, nursery)
        self._tools = BodyTools(volume, self.reader, self.writer, staging, config)
        self._volume = volume
        self._interval_s = config.commit_interval_s
        self._files: dict[int, OpenFile] = {}
        self._opens: dict[int, int] = {}
        self._failing: set[int] = set()

    # -- open files --------------------------------------------------------------------------------------------------

    def find(self, ino: int) -> OpenFile | None:
        """The open file of an inode, if it is open here (or still has uncommitted bytes)."""
        return self._files.get(ino)

    async def open(self, ino: int) -> OpenFile:
        """The inode's open file, as of now; `release` must follow. One request.

        Raises what `Volume.read_body` does.
        """
        body = await self._volume.read_body(ino)
        file = self.open_known(body)
        try:
            await file.refresh(body.inode, body)
        except BaseException:
            self.release(file)
            raise
        return file

    def open_known(self, body: Body) -> OpenFile:
        """As `open`, of a body that was just read, or of an inode that was just created. No request."""
        ino = body.inode.ino
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = OpenFile(self._tools, body)
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return file

    def release(self, file: OpenFile) -> None:
        """A handle is closed. After the last one the file is forgotten, unless it has uncommitted bytes: those are
        tried again in the background until they are committed. Commits nothing itself; no checkpoint."""
        self._opens[file.ino] -= 1
        self._forget_if_unused(file)

    def _forget_if_unused(self, file: OpenFile) -> None:
        if not self._opens.get(file.ino, 0) and not file.is_dirty and self._files.get(file.ino) is file:
            del self._files[file.ino]
            self._opens.pop(file.ino, None)
            self._failing.discard(file.ino)
            file.close()

    def session_lost(self) -> None:
        """To be called (`Volume.session_lost_hooks`) before the next session begins."""
        for file in list(self._files.values()):
            file.session_lost()
            self._forget_if_unused(file)

    @property
    def inodes(self) -> list[int]:
        """Those that are open here, or still have uncommitted bytes."""
        return list(self._files)

    @property
    def dirty_files(self) -> list[OpenFile]:
        return [file for file in self._files.values() if file.is_dirty]

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "open_files": len(self._files),
            "dirty_files": len(self.dirty_files),
            "cache_bytes": self.cache.bytes_used,
            "cache_hits": self.cache.hits,
            "cache_fetched": self.cache.fetched,
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
                    self._complain(file, exc)
                else:
                    self._failing.discard(file.ino)
                self._forget_if_unused(file)

        async with trio.open_nursery() as nursery:
            for _ in range(min(COMMITS_MAX, len(files))):
                nursery.start_soon(worker)

    def _complain(self, file: OpenFile, exc: Exception) -> None:
        """Once for each file that fails, until it has been committed."""
        if file.ino not in self._failing:
            self._failing.add(file.ino)
            log.error("inode %#x could not be committed and is tried again: %s", file.ino, exc)


@contextlib.asynccontextmanager
async def open_bodies(volume: BodyVolume, config: BodyConfig, open_store: OpenStore) -> AsyncIterator[Bodies]:
    """Bodies of a mounted volume; `open_store` opens a site's store by the site's id, at its first use.

    At the end nothing is committed any more: `commit_all` comes before. Raises CacheDirectoryUnusable.
    """
    cache_dir = os.fspath(config.cache_dir)
    async with (
        open_staging(cache_dir, config.disk_free_bytes_min) as staging,
        open_blob_source(open_store, volume.superblock.block_bytes) as source,
        contextlib.AsyncExitStack() as last,
        trio.open_nursery() as nursery,
    ):
        cache = BlockCache(source, config, os.path.join(staging.directory, "cache"), nursery)
        await cache.start()
        staging.make_room = cache.make_room
        bodies = Bodies(volume, config, source, cache, staging, nursery)
        # Only when the nursery's tasks have ended is nobody reading what is staged.
        last.callback(bodies.close)
        nursery.start_soon(bodies.write_back)
        try:
            yield bodies
        finally:
            nursery.cancel_scope.cancel()
