"""Publishing over stores in memory: who copies what, what is waited for, and when the rename comes."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.blobs import BlobSource, Block, block_count, block_of, open_blob_source
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.publish import Publication, PublishProgress
from apollofs.fs.replication import DirectReplication, Lacking, StoredFile
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import EntryExists, NoSuchEntry
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.volume import Volume
from tests.support.bodies import BrokenBlobs
from tests.support.volumes import ME, VOLUME, assert_sound, make_volume, mounted

HOME, OTHER = 1, 2
BLOCK = 1 << 16
FILES = 5
LENGTH = 2 * BLOCK + 100
KEYS = Keys(VOLUME)


class Place:
    """A volume with a directory `new` of files, whose bodies are at HOME, and an empty store at OTHER."""

    def __init__(self, store: MemoryStore, volume: Volume, stores: dict[int, BrokenBlobs], source: BlobSource) -> None:
        self.store = store
        self.volume = volume
        self.stores = stores
        self.source = source
        self.progress = PublishProgress()
        self.replicas = Replicas(store, KEYS)
        self.blobs: list[int] = []

    async def make(self) -> None:
        tree = (await self.volume.mkdir(ROOT_INO, b"new", 0o755, ME)).ino
        for number in range(FILES):
            tree = (await self.volume.mkdir(tree, b"below", 0o755, ME)).ino
            await self.save(tree, b"file%d" % number)

    async def save(self, directory: int, name: bytes) -> None:
        blob = self.volume.new_blob()
        self.blobs.append(blob)
        for block in blocks(blob):
            await self.source.put_block(block, os.urandom(block.length))
        inode = await self.volume.mknod(directory, name, stat.S_IFREG | 0o644, 0, ME)
        change = BodyChange(inode.body_version, LENGTH, (Extent(0, LENGTH, blob, 0, LENGTH),))
        await self.volume.commit_body(inode.ino, change)

    def direct(self) -> DirectReplication:
        return DirectReplication(self.source, self.replicas, self.volume.session)

    async def publish(self, replication: object = None, *, wait_s: float = 0) -> None:
        chosen = replication or self.direct()
        publication = Publication(self.store, self.volume, chosen, [HOME, OTHER], wait_s, self.progress)  # type: ignore[arg-type]
        await publication.run((ROOT_INO, b"new"), (ROOT_INO, b"shown"))

    async def is_everywhere(self) -> bool:
        known = await self.replicas.read(self.blobs)
        return all(copies.complete == (OTHER,) for copies in known.values())


def blocks(blob: int) -> list[Block]:
    return [block_of(blob, LENGTH, index, BLOCK) for index in range(block_count(LENGTH, BLOCK))]


@asynccontextmanager
async def placed() -> AsyncIterator[Place]:
    store = MemoryStore()
    await make_volume(store, block_bytes=BLOCK)
    stores = {site: BrokenBlobs(MemoryBlobs()) for site in (HOME, OTHER)}

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return stores[site]

    async with mounted(store) as volume, open_blob_source(open_store, BLOCK) as source:
        place = Place(store, volume, stores, source)
        await place.make()
        yield place
    await assert_sound(store)


async def test_everything_is_there_when_the_name_appears() -> None:
    async with placed() as place:
        await place.publish()
        assert await place.is_everywhere()
        for blob in place.blobs:
            for block in blocks(blob):
                copy = await place.stores[OTHER].read_block(block.name, block.length)
                assert copy == await place.stores[HOME].read_block(block.name, block.length)
        assert (place.progress.walk, place.progress.files) == (2, FILES)
        await place.volume.lookup(ROOT_INO, b"shown")


async def test_a_name_that_is_taken_is_not_replaced() -> None:
    async with placed() as place:
        await place.volume.mkdir(ROOT_INO, b"shown", 0o755, ME)
        with pytest.raises(EntryExists):
            await place.publish()
        assert not await place.is_everywhere()


async def test_what_agents_copy_is_waited_for_only() -> None:
    """Another way of copying: nothing is copied from here."""

    async with placed() as place:
        asked: list[int] = []

        class Agents:
            async def lacking(self, files: Sequence[StoredFile], sites: Collection[int]) -> list[Lacking]:
                return await place.direct().lacking(files, sites)

            async def provide(self, lacking: Sequence[Lacking]) -> None:
                asked.extend(one.blob for one in lacking)
                await place.direct().provide(lacking)

        await place.publish(Agents())
        assert sorted(asked) == sorted(place.blobs)


async def test_a_file_that_is_written_meanwhile_is_copied_too() -> None:
    async with placed() as place:

        class Slow(DirectReplication):
            grown = False

            async def provide(self, lacking: Sequence[Lacking]) -> None:
                await super().provide(lacking)
                if not Slow.grown:
                    Slow.grown = True
                    tree = await place.volume.lookup(ROOT_INO, b"new")
                    await place.save(tree.ino, b"late")

        await place.publish(Slow(place.source, place.replicas, place.volume.session))
        assert await place.is_everywhere()
        assert place.progress.files == FILES + 1


async def test_a_site_that_is_down_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    async with placed() as place:

        class Down(DirectReplication):
            left = 3

            async def provide(self, lacking: Sequence[Lacking]) -> None:
                if Down.left:
                    Down.left -= 1
                    raise BodyUnavailable("site 2 is down")
                await super().provide(lacking)

        down = Down(place.source, place.replicas, place.volume.session)
        with pytest.raises(UserError, match="not published: site 2 is down"):
            await place.publish(down)
        with pytest.raises(NoSuchEntry):
            await place.volume.lookup(ROOT_INO, b"shown")
        await place.publish(down, wait_s=60)
        assert await place.is_everywhere()


async def test_an_interrupted_publishing_goes_on() -> None:
    async with placed() as place:
        copied: list[int] = []

        with trio.CancelScope() as scope:

            def cut(size_bytes: int) -> None:
                copied.append(size_bytes)
                if len(copied) == 4:
                    scope.cancel()

            await place.publish(DirectReplication(place.source, place.replicas, place.volume.session, cut))
        assert scope.cancelled_caught
        await place.publish()
        assert await place.is_everywhere()
