"""Open files without a kernel: mounts of one volume with a blob store and caches, and faults on demand."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from apollofs.blobstore import BlobMetrics, BlobStat, BlobStoreOptions, BlockStore, Buffer
from apollofs.blobstore.footer import Footer
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.blobstore.open import wrap
from apollofs.fs.bodies import Bodies, open_bodies
from apollofs.fs.config import BodyConfig
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.codec import encode_superblock
from apollofs.metadata.errors import OutcomeUnknown, StoreUnavailable
from apollofs.metadata.fates import Fate
from apollofs.metadata.format import read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, Body, BodyChange, DirectoryPage, Inode, SetAttr
from apollofs.metadata.session import Session
from apollofs.metadata.store import Put
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, VOLUME, make_volume, mounted

T = TypeVar("T")
Hook = Callable[[], Awaitable[None]]


class BrokenBlobs(BlockStore):
    """Verified blobs in memory, shared by all mounts of a test; what fails next, or waits, is up to the test."""

    def __init__(self, raw: MemoryBlobs) -> None:
        self._inner = wrap(raw, BlobStoreOptions(), BlobMetrics())
        self.raw = raw
        self.fail_puts: list[Exception] = []
        """Raised by the next puts, in order."""
        self.fail_reads: list[Exception] = []
        self.fail_deletes: list[Exception] = []
        self.before_put: Hook | None = None
        self.before_read: Hook | None = None
        self.puts: list[str] = []
        self.reads: list[tuple[str, int, int | None]] = []
        self.under_way = 0
        self.under_way_max = 0

    async def put(self, name: str, data: Buffer) -> None:
        await self._put(name, self._inner.put, data)

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        await self._put(name, self._inner.put_sealed, sealed)

    async def _put(self, name: str, put: Callable[[str, Buffer], Awaitable[None]], data: Buffer) -> None:
        self.puts.append(name)
        if self.fail_puts:
            error = self.fail_puts.pop(0)
            await trio.lowlevel.checkpoint()
            raise error
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            if self.before_put is not None:
                await self.before_put()
            await put(name, data)
        finally:
            self.under_way -= 1

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        await self._read_begins(name, offset, length)
        return await self._inner.read_block(name, data_length, offset, length)

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        await self._read_begins(name, 0, None)
        return await self._inner.fetch_block(name, data_length, then)

    async def _read_begins(self, name: str, offset: int, length: int | None) -> None:
        self.reads.append((name, offset, length))
        if self.fail_reads:
            error = self.fail_reads.pop(0)
            await trio.lowlevel.checkpoint()
            raise error
        if self.before_read is not None:
            await self.before_read()

    def corrupt(self, name: str) -> None:
        """Flip a bit of a stored object."""
        data, modified_s = self.raw._blobs[name]
        self.raw._blobs[name] = (bytes([data[0] ^ 1]) + data[1:], modified_s)

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return await self._inner.read(name, offset, length)

    async def stat(self, name: str) -> BlobStat:
        return await self._inner.stat(name)

    async def delete(self, name: str) -> None:
        if self.fail_deletes:
            error = self.fail_deletes.pop(0)
            await trio.lowlevel.checkpoint()
            raise error
        await self._inner.delete(name)

    def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        return self._inner.list(prefix, start_after)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class BrokenVolume:
    """A mounted volume with small blocks, whose commits fail as the test says."""

    def __init__(self, volume: Volume, block_bytes: int) -> None:
        self.inner = volume
        self.superblock = replace(volume.superblock, block_bytes=block_bytes)
        self.faults: list[str] = []
        """For the next commits: "refused", or of unknown outcome: "lost" (not applied), "applied", "hangs" (applied,
        and no answer comes)."""
        self.hanging = trio.Event()
        self.before_commit: Hook | None = None
        self.commits: list[BodyChange] = []
        self.body_reads = 0

    @property
    def session(self) -> Session:
        return self.inner.session

    def new_blob(self) -> int:
        return self.inner.new_blob()

    async def read_body(self, ino: int) -> Body:
        self.body_reads += 1
        return await self.inner.read_body(ino)

    async def out_of_doubt(self) -> None:
        await self.inner.out_of_doubt()

    def fate_of(self, ino: int) -> Fate | None:
        return self.inner.fate_of(ino)

    def place_of(self, ino: int) -> tuple[int, bytes] | None:
        return self.inner.place_of(ino)

    async def lookup(self, parent: int, name: bytes) -> Inode:
        return await self.inner.lookup(parent, name)

    async def getattr(self, ino: int) -> Inode:
        return await self.inner.getattr(ino)

    def cached_listing(self, directory: int) -> DirectoryPage | None:
        return self.inner.cached_listing(directory)

    async def readdir(self, directory: int, after: bytes, limit: int, revision: int = 0) -> DirectoryPage:
        return await self.inner.readdir(directory, after, limit, revision)

    async def read_ahead(self, directory: int, files: Sequence[tuple[bytes, int]]) -> None:
        await self.inner.read_ahead(directory, files)

    async def setattr(self, ino: int, change: SetAttr) -> Inode:
        return await self.inner.setattr(ino, change)

    async def commit_body(self, ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        self.commits.append(change)
        if self.before_commit is not None:
            await self.before_commit()
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "refused":
            raise StoreUnavailable("refused by the test")
        if fault == "lost":
            self.inner.session.fates.begin(ino)
            raise OutcomeUnknown("lost by the test")
        inode = await self.inner.commit_body(ino, change, session)
        if fault == "hangs":
            self.hanging.set()
            await trio.sleep_forever()
        if fault == "applied":
            raise OutcomeUnknown("the reply was lost by the test")
        return inode


class Mount:
    """One mount of the test's volume."""

    def __init__(self, volume: BrokenVolume, bodies: Bodies) -> None:
        self.volume = volume
        self.bodies = bodies

    async def create(self, name: bytes = b"f") -> int:
        return (await self.volume.inner.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME)).ino

    async def content(self, ino: int) -> bytes:
        """The committed bytes, read by this mount as of now."""
        body = await self.volume.read_body(ino)
        return bytes(await self.bodies.reader.pread(body, 0, body.inode.size_bytes))


async def opened_there(other: Mount, name: bytes = b"f") -> OpenFile:
    """The file of that name in the root, opened by a mount that may never have seen it."""
    return await other.bodies.open((await other.volume.inner.lookup(ROOT_INO, name)).ino)


class World:
    """A volume, a blob store, and mounts."""

    def __init__(self, store: MemoryStore, blobs: BrokenBlobs, directory: Path, block_bytes: int) -> None:
        self.store = store
        self.blobs = blobs
        self._directory = directory
        self._block_bytes = block_bytes

    @contextlib.asynccontextmanager
    async def mount(self, name: str = "a", **options: object) -> AsyncIterator[Mount]:
        async def open_store(site: int) -> BlockStore:
            await trio.lowlevel.checkpoint()
            return self.blobs

        config = replace(BodyConfig(self._directory / name, disk_free_bytes_min=0), **options)  # type: ignore[arg-type]
        async with mounted(self.store) as inner:
            volume = BrokenVolume(inner, self._block_bytes)
            async with open_bodies(volume, config, open_store) as bodies:
                inner.session_lost_hooks.append(bodies.session_lost)
                yield Mount(volume, bodies)


BLOCK = 4096
"""Of the fixture `world`."""


@contextlib.asynccontextmanager
async def body_world(directory: Path, *, inline_bytes_max: int = 64, block_bytes: int = 256) -> AsyncIterator[World]:
    """A fresh volume; small limits, so that small data has many blocks."""
    store = MemoryStore()
    await make_volume(store, inline_bytes_max=inline_bytes_max)
    # smaller blocks than a volume can be formatted with, for those who read it as a whole, too
    superblock = replace(await read_superblock(store, VOLUME), block_bytes=block_bytes)
    await store.txn((), [Put(Keys(VOLUME).superblock, encode_superblock(superblock))])
    yield World(store, BrokenBlobs(MemoryBlobs()), directory, block_bytes)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Blocks of 4 KiB, so that small files have several."""
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made
