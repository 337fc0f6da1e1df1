"""The collector stopped at each of its steps, and run again: nothing that is used goes, nothing else stays."""

from __future__ import annotations

import os

import pytest

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.blobs import Block
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import ROOT_INO, SetAttr
from apollofs.metadata.store import Put
from tests.faults.hooked_store import HookedStore, Stopped, stopping
from tests.support.collecting import clone, collect, keys_in, objects
from tests.support.filesystems import LARGE, USER, Pair, close, content, save
from tests.support.volumes import mounted

pytestmark = pytest.mark.faults
REQUESTS = ("txn", "range")


async def prepare(pair: Pair) -> int:
    """Garbage of every kind, and beside it what is used; the handle of an unlinked file that is open."""
    for name in (b"kept", b"f", b"open", b"source", b"dropped"):
        await save(pair.here, name, LARGE)
    inos = [await save(pair.here, b"clone%d" % number, b"") for number in range(3)]
    source = (await pair.here.lookup(ROOT_INO, b"source")).ino
    for ino in inos:
        await clone(pair.store, pair.volume, source, ino)
    await pair.here.setattr((await pair.here.lookup(ROOT_INO, b"dropped")).ino, SetAttr(size_bytes=0))
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"open")).ino, os.O_RDONLY, USER)
    for name in (b"f", b"open", b"source", b"clone0", b"clone1"):
        await pair.here.unlink(ROOT_INO, name)
    await pair.volume.settle()
    async with mounted(pair.store) as ended:
        block = Block(ended.new_blob(), 0, 4)
    await pair.blobs.put(block.name, b"dead")
    return opened.fh


async def assert_collected(pair: Pair, fh: int) -> None:
    """One more run: what is used is whole, everything else is gone."""
    report = await collect(pair.store, pair.blobs)
    assert (report.errors, report.silent_mounts) == ([], [])
    assert await pair.there.read(fh, 0, len(LARGE)) == LARGE
    assert await content(pair.there, b"kept") == LARGE
    assert await content(pair.there, b"clone2") == LARGE
    await close(pair.there, fh)
    await collect(pair.store, pair.blobs)
    assert len(await objects(pair.blobs)) == 2
    assert await keys_in(pair.store, "gxQAC") == []
    assert len(await keys_in(pair.store, "r")) == 1


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(36))
async def test_stopped_at_a_request(pair: Pair, step: int, moment: Moment) -> None:
    fh = await prepare(pair)
    try:
        await collect(HookedStore(pair.store, stopping(step, moment, REQUESTS)), pair.blobs)
    except* Stopped:
        pass
    await assert_collected(pair, fh)


@pytest.mark.parametrize("step", range(3))
async def test_the_blob_store_fails_from_an_object_on(pair: Pair, step: int) -> None:
    fh = await prepare(pair)
    deleted = 0
    delete = pair.blobs.delete

    async def failing(name: str) -> None:
        nonlocal deleted
        deleted += 1
        if deleted > step:
            raise BlobStoreUnavailable("by the test")
        await delete(name)

    pair.blobs.delete = failing  # type: ignore[method-assign]
    report = await collect(pair.store, pair.blobs)
    assert report.errors
    pair.blobs.delete = delete  # type: ignore[method-assign]
    await assert_collected(pair, fh)


@pytest.mark.parametrize("step", range(12))
async def test_replies_that_are_lost_change_nothing(pair: Pair, step: int) -> None:
    """A transaction whose reply is lost is sent again, and does not happen twice."""
    fh = await prepare(pair)
    seen = 0

    async def hook(when: Moment, request: Request) -> None:
        nonlocal seen
        if when is Moment.AFTER and request.method == "txn" and any(isinstance(op, Put) for op in _writes(request)):
            seen += 1
            if seen == step + 4:
                raise OutcomeUnknown("by the test")

    await collect(HookedStore(pair.store, hook), pair.blobs)
    await assert_collected(pair, fh)


def _writes(request: Request) -> tuple[object, ...]:
    writes = request.arguments[1]
    assert isinstance(writes, tuple)
    return writes


async def test_a_commit_while_objects_are_deleted(pair: Pair) -> None:
    """The file that loses blobs is written meanwhile."""
    fh = await prepare(pair)
    delete = pair.blobs.delete
    rounds = 0

    async def writing(name: str) -> None:
        nonlocal rounds
        rounds += 1
        new = b"new%d" % rounds
        ino = await save(pair.here, new, LARGE)
        await pair.here.setattr(ino, SetAttr(size_bytes=0))
        await pair.here.unlink(ROOT_INO, new)
        await delete(name)

    pair.blobs.delete = writing  # type: ignore[method-assign]
    report = await collect(pair.store, pair.blobs)
    assert report.errors == []
    pair.blobs.delete = delete  # type: ignore[method-assign]
    await assert_collected(pair, fh)
