"""Two Filesystems on one volume and one blob store, without a kernel."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.attributes import Attributes, Caller
from apollofs.fs.config import BodyConfig
from apollofs.fs.filesystem import Filesystem, open_filesystem
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.volume import Volume
from tests.support.bodies import BrokenBlobs
from tests.support.volumes import assert_sound, make_volume, mounted

ROOT = Caller(0, 0, os.getpid())
USER = Caller(1000, 1000, os.getpid())
OWNER = 7
LARGE = b"0123456789abcdef" * 1000


@dataclass
class Pair:
    here: Filesystem
    there: Filesystem
    volume: Volume
    """That of `here`."""
    store: MemoryStore
    blobs: BrokenBlobs


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    store = MemoryStore()
    await make_volume(store, inline_bytes_max=64)
    blobs = BrokenBlobs(MemoryBlobs())

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return blobs

    async with AsyncExitStack() as stack:
        found = []
        for name in ("here", "there"):
            volume = await stack.enter_async_context(mounted(store))
            config = BodyConfig(tmp_path / name, disk_free_bytes_min=0, commit_interval_s=3600)
            found.append((await stack.enter_async_context(open_filesystem(volume, open_store, config)), volume))
        yield Pair(found[0][0], found[1][0], found[0][1], store, blobs)
    await assert_sound(store)


async def create(fs: Filesystem, name: bytes = b"f", flags: int = os.O_RDWR) -> tuple[Attributes, int]:
    attributes, opened = await fs.create(ROOT_INO, name, 0o644, flags | os.O_CREAT, USER)
    return attributes, opened.fh


async def save(fs: Filesystem, name: bytes, data: bytes) -> int:
    """A file with these bytes, closed; its inode number."""
    attributes, fh = await create(fs, name)
    await fs.write(fh, 0, data)
    await close(fs, fh)
    return attributes.ino


async def close(fs: Filesystem, fh: int) -> None:
    await fs.flush(fh, OWNER, os.getpid())
    await fs.release(fh, OWNER, flock=False)


async def content(fs: Filesystem, name: bytes = b"f") -> bytes:
    found = await fs.lookup(ROOT_INO, name)
    fh = (await fs.open(found.ino, os.O_RDONLY, USER)).fh
    data = bytes(await fs.read(fh, 0, 1 << 20))
    await close(fs, fh)
    return data
