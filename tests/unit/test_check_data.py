"""Verifying the bodies of a tree: what is damaged or missing is named, what has just been replaced is not."""

from __future__ import annotations

import pytest
import trio

from apollofs.blobstore import BlobStoreUnavailable, BlockStore
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.check_data import DAMAGED, MISSING, UNREADABLE, DataCheck, DataTotals, Flaw
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.tree import Tree
from tests.support.collecting import KEYS, collect, objects
from tests.support.filesystems import LARGE, USER, Pair, close, create, save


async def verify(pair: Pair, path: bytes = b"/") -> tuple[DataTotals, list[Flaw]]:
    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return pair.blobs

    found: list[Flaw] = []
    async with open_blob_source(open_store, pair.volume.superblock.block_bytes) as source:
        totals = await DataCheck(Tree(pair.store, KEYS), source, found.append).run(path)
    assert totals.flaws == len(found)
    return totals, found


async def tree(pair: Pair) -> None:
    """Files of every kind in two directories: /f, /big (3 blocks), /many (its extents are in pages), /d/e/g."""
    await save(pair.here, b"f", LARGE)
    await save(pair.here, b"big", LARGE * 12)
    await save(pair.here, b"small", b"inline")
    _, fh = await create(pair.here, b"many")
    for number in range(40):
        await pair.here.write(fh, number * 1000, b"x" * 100)
        await pair.here.fsync(fh, data_only=False)
    await close(pair.here, fh)
    d = await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    e = await pair.here.mkdir(d.ino, b"e", 0o755, USER)
    ino = await save(pair.here, b"g", LARGE)
    await pair.here.link(ino, e.ino, b"g")
    await pair.here.unlink(ROOT_INO, b"g")
    await pair.here.symlink(ROOT_INO, b"link", b"nowhere", USER)


async def test_a_sound_tree(pair: Pair) -> None:
    await tree(pair)
    totals, _ = await verify(pair)
    assert (totals.files, totals.flaws) == (5, 0)
    assert totals.blocks == len(await objects(pair.blobs))
    assert (await verify(pair, b"/d"))[0].blocks == 1
    assert (await verify(pair, b"d/e/g"))[0].files == 1


@pytest.mark.expects_log("corrupt data .* the blob store")
async def test_what_is_damaged_missing_or_unreadable_is_named(pair: Pair) -> None:
    await tree(pair)
    extent = (await pair.volume.read_body((await pair.here.lookup(ROOT_INO, b"big")).ino)).inode.extents[0]
    blocks = sorted(name for name in await objects(pair.blobs) if f"{extent.blob:016x}" in name)
    pair.blobs.corrupt(blocks[1])
    await pair.blobs.delete(blocks[2])
    totals, found = await verify(pair)
    assert [(flaw.path, flaw.block, flaw.what) for flaw in sorted(found, key=lambda flaw: flaw.block)] == [
        (b"/big", 1, DAMAGED),
        (b"/big", 2, MISSING),
    ]
    assert totals.files == 5
    pair.blobs.fail_reads = [BlobStoreUnavailable("by the test")]
    _, (flaw,) = await verify(pair, b"/d/e")
    assert (flaw.path, flaw.what) == (b"/d/e/g", UNREADABLE)


async def test_a_file_that_is_replaced_and_collected_meanwhile_is_no_flaw(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)

    async def replaced() -> None:
        pair.blobs.before_read = None
        await pair.here.unlink(ROOT_INO, b"f")
        await save(pair.here, b"f", LARGE[::-1])
        await pair.volume.settle()
        assert (await collect(pair.store, pair.blobs)).tombstones == 1

    pair.blobs.before_read = replaced
    totals, found = await verify(pair)
    assert (totals.files, found) == (1, [])
