"""Blobs that several inodes refer to: collected when the last one has dropped them, whatever happens at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from apollofs.fs.collector import IN_USE
from apollofs.metadata.format import pages
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import ROOT_INO, SetAttr
from apollofs.metadata.store import Delete, Put
from tests.faults.hooked_store import HookedStore
from tests.support.collecting import KEYS, clone, collect, keys_in, objects
from tests.support.filesystems import LARGE, Pair, content, save


async def cloned(pair: Pair, count: int = 2) -> list[int]:
    """Files 0, 1, ... of one blob; their inodes."""
    inos = [await save(pair.here, b"%d" % number, LARGE if not number else b"") for number in range(count)]
    for ino in inos[1:]:
        await clone(pair.store, pair.volume, inos[0], ino)
    return inos


async def unlink(pair: Pair, *numbers: int) -> None:
    for number in numbers:
        await pair.volume.unlink(ROOT_INO, b"%d" % number)
    await pair.volume.settle()


async def test_a_blob_stays_as_long_as_somebody_refers_to_it(pair: Pair) -> None:
    await cloned(pair)
    await unlink(pair, 0)
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs, report.shared_blobs) == (1, 0, 1)
    assert await content(pair.there, b"1") == LARGE
    assert len(await keys_in(pair.store, "r")) == 1
    await unlink(pair, 1)
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1
    assert await objects(pair.blobs) == []
    assert await keys_in(pair.store, "rg") == []


async def test_all_of_a_large_pack_dropped_at_once(pair: Pair) -> None:
    await cloned(pair, 230)
    await unlink(pair, *range(229))
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs, report.shared_blobs) == (229, 0, 1)
    assert len(await keys_in(pair.store, "r")) == 1
    await unlink(pair, 229)
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1
    assert await keys_in(pair.store, "rg") == []
    assert await objects(pair.blobs) == []


async def test_the_last_referents_dropped_at_once(pair: Pair) -> None:
    await cloned(pair, 130)
    await unlink(pair, *range(130))
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs) == (130, 1)
    assert await keys_in(pair.store, "rg") == []
    assert await objects(pair.blobs) == []


async def test_who_refers_to_it_again_keeps_it(pair: Pair) -> None:
    zero, one = await cloned(pair)
    await pair.volume.setattr(zero, SetAttr(size_bytes=0))
    await clone(pair.store, pair.volume, one, zero)
    await unlink(pair, 1)
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs) == (2, 0)
    assert await content(pair.there, b"0") == LARGE
    await unlink(pair, 0)
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1
    assert await keys_in(pair.store, "rg") == []


async def test_dropped_referred_to_again_and_dropped_again(pair: Pair) -> None:
    zero, one = await cloned(pair)
    await pair.volume.setattr(zero, SetAttr(size_bytes=0))
    await clone(pair.store, pair.volume, one, zero)
    await unlink(pair, 0, 1)
    report = await collect(pair.store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs) == (3, 1)
    assert await keys_in(pair.store, "rg") == []
    assert await objects(pair.blobs) == []


async def meanwhile(pair: Pair, what: Callable[[], Awaitable[None]]) -> HookedStore:
    """A store on which `what` happens once, when a reference is about to be removed."""
    done = False

    async def hook(moment: Moment, request: Request) -> None:
        nonlocal done
        if moment is not Moment.BEFORE or request.method != "txn" or done:
            return
        writes = request.arguments[1]
        assert isinstance(writes, tuple)
        if any(isinstance(write, Delete) and write.key.startswith(KEYS.table(b"r")) for write in writes):
            done = True
            await what()

    return HookedStore(pair.store, hook)


async def test_a_clone_while_the_reference_is_removed(pair: Pair) -> None:
    zero, one = await cloned(pair)
    await pair.volume.setattr(zero, SetAttr(size_bytes=0))
    store = await meanwhile(pair, lambda: clone(pair.store, pair.volume, one, zero))
    report = await collect(store, pair.blobs)
    assert (report.tombstones, report.dropped.blobs) == (1, 0)
    assert len(await keys_in(pair.store, "r")) == 2
    await unlink(pair, 1)
    await collect(pair.store, pair.blobs)
    assert await content(pair.there, b"0") == LARGE


async def test_the_referent_that_was_relied_on_goes_meanwhile(pair: Pair) -> None:
    _, one = await cloned(pair)
    await unlink(pair, 0)
    blob = (await pair.volume.read_body(one)).inode.extents[0].blob

    async def another_collector_was_faster() -> None:
        await unlink(pair, 1)
        await pair.store.txn((), [Delete(KEYS.reference(blob, one))])

    report = await collect(await meanwhile(pair, another_collector_was_faster), pair.blobs)
    assert report.dropped.blobs == 1
    await collect(pair.store, pair.blobs)
    assert await objects(pair.blobs) == []
    assert await keys_in(pair.store, "rg") == []


async def test_shared_blobs_of_ended_sessions_are_no_dead_uploads(pair: Pair) -> None:
    ino = await save(pair.here, b"0", LARGE)
    blob = (await pair.volume.read_body(ino)).inode.extents[0].blob
    await pair.store.txn((), [Put(KEYS.reference(blob, ino), b"")])
    assert (await collect(pair.store, pair.blobs)).uploads.blobs == 0
    assert await content(pair.there, b"0") == LARGE


async def test_a_pack_stays_until_all_its_members_are_committed(pair: Pair) -> None:
    """The first one may be gone before the last one is there."""
    zero = await save(pair.here, b"0", LARGE)
    body = await pair.volume.read_body(zero)
    (blob,) = {extent.blob for extent in body.inode.extents}
    await pair.store.txn((), [Put(KEYS.reference(blob, zero), b"")])
    pair.volume.uses.blobs_in_use = lambda: {blob}
    await unlink(pair, 0)
    assert (await collect(pair.store, pair.blobs)).kept_by_reason == {IN_USE: 1}
    assert len(await objects(pair.blobs)) == 1
    pair.volume.uses.blobs_in_use = tuple
    assert (await collect(pair.store, pair.blobs)).dropped.blobs == 1


async def in_one_transaction(pair: Pair, ino: int, blob: int) -> None:
    """As if the newest tombstone of an inode and its reference to the blob had been put by one transaction."""
    stones = [kv async for kv in pages(pair.store, KEYS.tombstones)]
    stone = next(kv for kv in stones if KEYS.parse_tombstone(kv.key)[1] == ino)
    await pair.store.txn((), [Delete(stone.key)])
    await pair.store.txn((), [Put(stone.key, stone.value), Put(KEYS.reference(blob, ino), b"")])


@pytest.mark.parametrize("moved", ["", "renamed", "linked"])
@pytest.mark.parametrize("then", ["cloned", "cloned, unlinked", "dropped", "dropped, unlinked"])
async def test_dropped_and_shared_in_one_transaction(pair: Pair, then: str, moved: str) -> None:
    """Only the inode tells what came last."""
    zero, one = await cloned(pair)
    (blob,) = {extent.blob for extent in (await pair.volume.read_body(zero)).inode.extents}
    await pair.volume.setattr(zero, SetAttr(size_bytes=0))
    if then.startswith("cloned"):
        await clone(pair.store, pair.volume, one, zero)
    await in_one_transaction(pair, zero, blob)
    if moved == "renamed":
        await pair.volume.rename(ROOT_INO, b"0", ROOT_INO, b"new")
    elif moved == "linked":
        await pair.volume.link(zero, ROOT_INO, b"new")
        await unlink(pair, 0)
    await unlink(pair, 1)
    if "unlinked" in then:
        await pair.volume.unlink(ROOT_INO, b"new" if moved else b"0")
        await pair.volume.settle()
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == (1 if then == "cloned" else 0)
    assert len(await keys_in(pair.store, "r")) == (1 if then == "cloned" else 0)
    assert await keys_in(pair.store, "g") == []
    if then == "cloned":
        assert await content(pair.there, b"new" if moved else b"0") == LARGE
