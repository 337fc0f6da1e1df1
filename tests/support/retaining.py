"""Checkpoints in a volume in memory, and runs of retention over them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from apollofs.blobstore import BlockStore
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.command_volume import command_record
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.retention import ApplyOptions, RetentionReport
from apollofs.fs.retention.applying import run_once
from apollofs.fs.retention.series import TRACKER_BYTES_MAX
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata.errors import NoSuchEntry
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.retention import SetRetention
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.retention import Retention
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume, open_volume
from tests.support.filesystems import LARGE, USER, Pair, close
from tests.support.volumes import SITE, VOLUME

KEYS = Keys(VOLUME)
NOW = Retention(last=1, settle_s=0)
OPTIONS = SessionOptions(lease_ttl_s=10, operation_deadline_s=10, slots=16, delegations=False, write_back=False)


@asynccontextmanager
async def retainer(pair: Pair, store: Store | None = None) -> AsyncIterator[tuple[Volume, ValueBodies]]:
    """What a run works with, on the pair's store or another way to it."""

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return pair.blobs

    record = replace(command_record("0"), site=SITE)
    async with (
        open_volume(store or pair.store, VOLUME, SITE, OPTIONS, record) as volume,
        open_blob_source(open_store, volume.superblock.block_bytes) as source,
    ):
        yield volume, ValueBodies(source, volume.superblock.inline_bytes_max, TRACKER_BYTES_MAX)


async def apply(
    pair: Pair, options: ApplyOptions = ApplyOptions(answer_wait_s=5), store: Store | None = None
) -> RetentionReport:
    async with retainer(pair, store) as (volume, bodies):
        return await run_once(store or pair.store, volume, bodies, options)


async def keep(pair: Pair, policy: Retention, directory: int = ROOT_INO) -> None:
    await set_retention(pair.volume, directory, policy)


async def set_retention(volume: Volume, directory: int, policy: Retention | None) -> None:
    await volume.transact(lambda scope: SetRetention(scope, directory, policy))


async def mkdir(fs: Filesystem, name: bytes, parent: int = ROOT_INO) -> int:
    return (await fs.mkdir(parent, name, 0o755, USER)).ino


async def write(fs: Filesystem, name: bytes, data: bytes = LARGE, parent: int = ROOT_INO) -> int:
    attributes, opened = await fs.create(parent, name, 0o644, os.O_RDWR | os.O_CREAT, USER)
    await fs.write(opened.fh, 0, data)
    await close(fs, opened.fh)
    return attributes.ino


@dataclass
class Run:
    """Checkpoints that a training run has saved: directories with some files in them."""

    pair: Pair
    directory: int = ROOT_INO
    inos: dict[int, int] = field(default_factory=dict)
    files: dict[int, tuple[bytes, ...]] = field(default_factory=dict)

    async def save(self, *steps: int, files: tuple[bytes, ...] = (b"model", b"optimizer")) -> None:
        for step in steps:
            self.inos[step] = await mkdir(self.pair.here, b"step%d" % step, self.directory)
            self.files[step] = tuple(sorted(files))
            for name in files:
                await write(self.pair.here, name, parent=self.inos[step])

    async def left(self) -> set[int]:
        """The steps that another mount sees, each whole."""
        found = set()
        for step in self.inos:
            try:
                inode = await self.pair.there.lookup(self.directory, b"step%d" % step)
            except NoSuchEntry:
                continue
            assert inode.ino == self.inos[step]
            page = await self.pair.volume.readdir(inode.ino, b"", 10)
            assert tuple(entry.name for entry in page.entries) == self.files[step]
            found.add(step)
        return found
