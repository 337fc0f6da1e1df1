"""What the whole-namespace checker says of blobs that several inodes refer to."""

from __future__ import annotations

import stat

import pytest
import trio.testing

from apollofs.metadata.check import Violation, check_volume
from apollofs.metadata.errors import CloneSourceChanged
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, SetAttr
from apollofs.metadata.store import Delete, Op, Put
from tests.support.volumes import ME, VOLUME, make_volume, mounted

KEYS = Keys(VOLUME)
FILE = stat.S_IFREG | 0o644


async def violations(store: MemoryStore) -> list[Violation]:
    return [violation async for violation in check_volume(store, VOLUME)]


class Shared:
    """A volume where two files share a blob; their numbers, and the blob's."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.blob = self.source = self.target = 0

    async def make(self) -> None:
        await make_volume(self.store)
        async with mounted(self.store) as volume:
            self.blob = volume.new_blob()
            self.source = (await volume.mknod(ROOT_INO, b"s", FILE, 0, ME)).ino
            self.target = (await volume.mknod(ROOT_INO, b"t", FILE, 0, ME)).ino
            extents = (Extent(0, 9000, self.blob, 0, 9000),)
            await volume.commit_body(self.source, BodyChange(0, 9000, extents=extents))
            await volume.commit_body(self.target, BodyChange(0, 9000, extents=extents, cloned_from=self.source))

    async def damaged(self, *writes: Op) -> list[tuple[str, int]]:
        """(table, inode) of what is found wrong after these writes."""
        await self.store.txn((), writes)
        return [(found.table, found.ino) for found in await violations(self.store)]


@pytest.fixture
async def shared() -> Shared:
    made = Shared()
    await made.make()
    assert await violations(made.store) == []
    return made


async def test_a_blob_that_is_shared_needs_a_reference_of_each(shared: Shared) -> None:
    assert await shared.damaged(Delete(KEYS.reference(shared.blob, shared.source))) == [("r", shared.source)]


async def test_a_blob_without_references_is_of_one_inode(shared: Shared) -> None:
    found = await shared.damaged(
        Delete(KEYS.reference(shared.blob, shared.source)), Delete(KEYS.reference(shared.blob, shared.target))
    )
    assert found in ([("r", shared.source)], [("r", shared.target)])


async def test_a_reference_to_nothing(shared: Shared) -> None:
    assert await shared.damaged(Put(KEYS.reference(shared.blob, 99), b"")) == [("r", 99)]


async def test_a_reference_stays_while_a_tombstone_tells_of_it(shared: Shared) -> None:
    async with mounted(shared.store) as volume:
        await trio.testing.wait_all_tasks_blocked()
        await volume.lookup(ROOT_INO, b"s")
        await volume.setattr(shared.source, SetAttr(size_bytes=0))
        await volume.unlink(ROOT_INO, b"t")
    assert await violations(shared.store) == []
    prefix = KEYS.tombstones
    found = await shared.damaged(Delete(prefix, prefix[:-1] + b"0"))
    assert found == [("r", shared.source), ("r", shared.target)]


async def test_a_clone_of_what_the_source_does_not_have_is_refused(shared: Shared) -> None:
    async with mounted(shared.store) as volume:
        for name in (b"s", b"t"):
            await volume.lookup(ROOT_INO, name)
        strange = (Extent(0, 10, volume.new_blob(), 0, 10),)
        with pytest.raises(CloneSourceChanged):
            await volume.commit_body(shared.target, BodyChange(1, 10, extents=strange, cloned_from=shared.source))
        with pytest.raises(CloneSourceChanged):
            await volume.commit_body(shared.target, BodyChange(1, 10, extents=strange, cloned_from=shared.target))
        await volume.unlink(ROOT_INO, b"s")
        extents = (Extent(0, 10, shared.blob, 0, 9000),)
        with pytest.raises(CloneSourceChanged):
            await volume.commit_body(shared.target, BodyChange(1, 10, extents=extents, cloned_from=shared.source))
    assert await violations(shared.store) == []


async def test_what_a_tombstone_says_was_dropped_is_in_use_by_nobody() -> None:
    """A body is laid over a file that refers to a blob which this file has dropped before."""
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as volume:
        ino, blob = (await volume.mknod(ROOT_INO, b"f", FILE, 0, ME)).ino, volume.new_blob()
        extents = (Extent(0, 9000, blob, 0, 9000),)
        await volume.commit_body(ino, BodyChange(0, 9000, extents=extents))
        cut = await volume.setattr(ino, SetAttr(size_bytes=0))
        assert await violations(store) == []
        await volume.commit_body(ino, BodyChange(cut.body_version, 9000, extents=extents, lifts_inline=True))
        (found,) = await violations(store)
        assert (found.table, found.ino) == ("g", ino) and "has dropped blob" in found.message
