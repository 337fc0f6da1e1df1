"""Publishing a finished directory: one rename, when the sites that are named hold every body of it.

The tree is walked, and what a site lacks is copied there, a batch of files at a time; then walked again, until a whole
walk has found nothing lacking; then renamed, in one transaction. Whoever looks, at any site, sees all of it or nothing,
and reads it from its own site. What is interrupted goes on when it is begun again: what was copied is noted.

The tree should be finished: a body that is written there during the last walk may be behind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreError, BlobStoreOptions
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.command_volume import command_volume
from apollofs.fs.errors import BodyError
from apollofs.fs.replication import DirectReplication, Replication, StoredFile
from apollofs.fs.site_stores import SiteStores
from apollofs.fs.user_error import UserError
from apollofs.metadata import codec
from apollofs.metadata.errors import EntryExists, NoSuchEntry, StoreError
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.common import Location
from apollofs.metadata.records import Inode, RenameFlag
from apollofs.metadata.replicas import Referent, Replicas
from apollofs.metadata.session import retry
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end
from apollofs.metadata.volume import Volume

READ_S = 30.0
PAGE_KEYS = 100
"""Names that are looked at, and files whose bodies are copied, at a time."""
WALKS_MAX = 10
PAUSE_FIRST_S, PAUSE_MAX_S = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """`sites`: names of those that must hold everything. `wait_s`: for how long a site that can't be reached is tried
    again; 0: not."""

    sites: tuple[str, ...]
    wait_s: float = 0.0


@dataclass
class PublishProgress:
    """How far it is."""

    walk: int = 0
    """1: the one that copies."""
    files: int = 0
    """Seen in this walk."""
    size_bytes: int = 0
    """In blobs, of these files."""
    copied_bytes: int = 0
    trouble: str = ""
    """Why it waits."""


Tell = Callable[[PublishProgress], None]


async def publish(
    store: Store,
    volume: str,
    source: Location,
    target: Location,
    options: PublishOptions,
    stores: BlobStoreOptions,
    version: str,
    tell: Tell = lambda _: None,
) -> PublishProgress:
    """Rename the directory `source` to `target`, which must not exist, when the sites hold it: (directory, name) each.

    Raises UserError (a site that the volume has not, or that can't be reached; what is written to all the time), the
    errors of `Volume.rename`, SessionLost, DeadlineExceeded, StoreError, BodyError. Then nothing was renamed.
    """
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(command_volume(store, volume, version))
        sites = {site.name: site.id for site in await opened.sites()}
        unknown = [name for name in options.sites if name not in sites]
        if unknown:
            raise UserError(f"the volume has no site {unknown[0]!r}: see `apollofs site list`")
        stores_of = SiteStores(opened, stores)
        blobs = await stack.enter_async_context(open_blob_source(stores_of.open, opened.superblock.block_bytes))
        progress = PublishProgress()

        def copied(size_bytes: int) -> None:
            progress.copied_bytes += size_bytes
            tell(progress)

        replicas = Replicas(store, Keys(volume))
        replication = DirectReplication(blobs, replicas, opened.session, copied)
        wanted = [sites[name] for name in options.sites]
        publication = Publication(store, opened, replication, wanted, options.wait_s, progress, tell)
        await publication.run(source, target)
        return progress


class Publication:
    """One publishing. `sites`: ids."""

    def __init__(
        self,
        store: Store,
        volume: Volume,
        replication: Replication,
        sites: Sequence[int],
        wait_s: float,
        progress: PublishProgress,
        tell: Tell = lambda _: None,
    ) -> None:
        self._store = store
        self._keys = Keys(volume.superblock.name)
        self._volume = volume
        self._replication = replication
        self._sites = sites
        self._wait_s = wait_s
        self._progress = progress
        self._tell = tell

    async def run(self, source: Location, target: Location) -> None:
        """See `publish`."""
        root = await self._volume.lookup(*source)
        if not root.is_dir:
            raise UserError(f"{os.fsdecode(source[1])} is no directory")
        await self._check_free(target)
        for walk in range(1, WALKS_MAX + 1):
            self._progress.walk, self._progress.files, self._progress.size_bytes = walk, 0, 0
            if not await self._walk(root.ino):
                await self._volume.rename(*source, *target, RenameFlag.NOREPLACE)
                return
        raise UserError(f"{os.fsdecode(source[1])} is being written all the time: publish it when it is finished")

    async def _check_free(self, target: Location) -> None:
        try:
            await self._volume.lookup(*target)
        except NoSuchEntry:
            return
        raise EntryExists(f"{os.fsdecode(target[1])} exists already; publishing replaces nothing")

    async def _walk(self, root: int) -> bool:
        """Look at everything below, and have copied what is lacking; whether there was any."""
        lacked = False
        directories = [root]
        while directories:
            directory = directories.pop()
            async with aclosing(self._pages(directory)) as pages:
                async for files, below in pages:
                    directories += below
                    lacked = await self._look_at(files) or lacked
        return lacked

    async def _look_at(self, files: Sequence[StoredFile]) -> bool:
        lacking = await self._replication.lacking(files, self._sites)
        if lacking:
            await self._patiently(files)
        self._progress.files += len(files)
        self._progress.size_bytes += sum(extent.length for file in files for extent in file.extents)
        self._tell(self._progress)
        return bool(lacking)

    async def _patiently(self, files: Sequence[StoredFile]) -> None:
        """Have copied what these files lack, again while a site can't be reached and may be waited for."""
        deadline, pause_s = trio.current_time() + self._wait_s, PAUSE_FIRST_S
        while True:
            try:
                await self._replication.provide(await self._replication.lacking(files, self._sites))
                self._progress.trouble = ""
                return
            except (BodyError, BlobStoreError, StoreError, UserError) as exc:
                if trio.current_time() + pause_s > deadline:
                    raise UserError(f"not published: {exc}; what was copied stays, run it again to go on") from exc
                self._progress.trouble = str(exc)
                self._tell(self._progress)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _pages(self, directory: int) -> AsyncGenerator[tuple[list[StoredFile], list[int]], None]:
        """The files of a directory with bodies in blobs, some at a time, and its subdirectories."""
        prefix = self._keys.dentries_of(directory)
        start, more = prefix, True
        while more:
            found = await self._read(Range(start, prefix_end(prefix), limit=PAGE_KEYS))
            files: list[StoredFile] = []
            below: list[int] = []
            for kv in found:
                dentry = codec.decode_dentry(kv.value, kv.mod_revision)
                if stat.S_ISDIR(dentry.file_type):
                    below.append(dentry.ino)
                elif stat.S_ISREG(dentry.file_type):
                    files += await self._stored(kv, dentry.ino, dentry.inode)
            yield files, below
            more = len(found) == PAGE_KEYS
            start = found[-1].key + b"\0" if found else start

    async def _stored(self, kv: KeyValue, ino: int, inode: Inode | None) -> list[StoredFile]:
        if inode is None:
            own = await self._read(Range(self._keys.inode(ino)))
            if not own:
                return []  # it has lost its names since
            kv, inode = own[0], codec.decode_inode(own[0].value, own[0].mod_revision)
        extents = inode.extents
        if inode.extent_pages:
            pages = self._keys.extents_of(ino)
            found = await self._read(Range(pages, prefix_end(pages)))
            extents = tuple(extent for page in found for extent in codec.decode_extents(page.value))
        return [StoredFile(Referent(kv.key, kv.mod_revision), extents)] if extents else []

    async def _read(self, asked: Range) -> tuple[KeyValue, ...]:
        return (await retry(lambda: self._store.range(asked), READ_S)).kvs
