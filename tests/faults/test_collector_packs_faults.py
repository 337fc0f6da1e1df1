"""Packs are rewritten while the collector is stopped at each of its steps, loses replies, or loses its role."""

from __future__ import annotations

import os

import pytest
import trio

from apollofs.blobstore import Buffer
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Delete, Put
from tests.faults.hooked_store import HookedStore, Stopped, stopping
from tests.support.collecting import KEYS, collect, keys_in, objects
from tests.support.filesystems import USER, Pair, close, content
from tests.support.filesystems import pair as pair
from tests.support.packs import MEMBER, body, pack

pytestmark = pytest.mark.faults
KEPT = (7, 8, 18, 19)


async def prepare(pair: Pair) -> int:
    """Two packs that are mostly dead and past the collection of their tombstones; the handle of a reader."""
    for first in (0, 10):
        await pack(pair, 10, first)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"8")).ino, os.O_RDONLY, USER)
    for number in range(20):
        if number not in KEPT:
            await pair.here.unlink(ROOT_INO, b"%d" % number)
    await pair.volume.settle()
    return opened.fh


async def assert_rewritten(pair: Pair, fh: int) -> None:
    """More runs: what is left is whole, for who reads the old bytes too, and everything else goes."""
    report = await collect(pair.store, pair.blobs)
    assert report.errors == []
    assert await pair.there.read(fh, 0, 2 * MEMBER) == body(8)
    await close(pair.there, fh)
    for _ in range(3):
        await collect(pair.store, pair.blobs)
    for number in KEPT:
        assert await content(pair.there, b"%d" % number) == body(number)
    blobs = {KEYS.parse_numbers(key)[0] for key in await keys_in(pair.store, "r")}
    assert len(await objects(pair.blobs)) == len(blobs) <= 2
    assert len(await keys_in(pair.store, "r")) == len(KEPT)
    assert await keys_in(pair.store, "gQAC") == []


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(28, 70))
async def test_stopped_at_a_request(pair: Pair, step: int, moment: Moment) -> None:
    fh = await prepare(pair)
    try:
        await collect(HookedStore(pair.store, stopping(step, moment, ("txn", "range"))), pair.blobs)
    except* Stopped:
        pass
    await assert_rewritten(pair, fh)


@pytest.mark.parametrize("step", range(4))
async def test_moves_whose_replies_are_lost_happen_once(pair: Pair, step: int) -> None:
    fh = await prepare(pair)
    seen = 0

    async def hook(when: Moment, request: Request) -> None:
        nonlocal seen
        if when is Moment.AFTER and request.method == "txn" and any(_moves(request)):
            seen += 1
            if seen == step + 1:
                raise OutcomeUnknown("by the test")

    report = await collect(HookedStore(pair.store, hook), pair.blobs)
    assert report.rewritten.files == len(KEPT)
    await assert_rewritten(pair, fh)


def _moves(request: Request) -> list[bool]:
    writes = request.arguments[1]
    assert isinstance(writes, tuple)
    return [isinstance(write, Put) and write.key.startswith(KEYS.table(b"r")) for write in writes]


async def test_who_is_no_collector_any_more_moves_nothing(pair: Pair) -> None:
    """Between the new blob and the moves its role was taken away: another collector may do what it likes."""
    fh = await prepare(pair)
    put = pair.blobs.put

    async def deposed(name: str, data: Buffer) -> None:
        await put(name, data)
        await pair.store.txn((), [Delete(KEYS.collector)])

    pair.blobs.put = deposed  # type: ignore[method-assign]
    assert (await collect(pair.store, pair.blobs)).rewritten.files == 0
    pair.blobs.put = put  # type: ignore[method-assign]
    await assert_rewritten(pair, fh)


async def test_files_that_move_about_while_they_are_looked_for(pair: Pair) -> None:
    """Renamed between requests."""
    fh = await prepare(pair)
    names = {number: b"%d" % number for number in KEPT}
    turns, one_at_a_time = 0, trio.Lock()

    async def hook(when: Moment, request: Request) -> None:
        nonlocal turns
        if when is Moment.BEFORE and request.method in ("txn", "range"):
            turns += 1
            if turns % 3:
                return
            number = KEPT[turns % len(KEPT)]
            new = b"%d-%d" % (number, turns)
            async with one_at_a_time:
                with trio.CancelScope(shield=True):
                    await pair.volume.rename(ROOT_INO, names[number], ROOT_INO, new)
                names[number] = new

    report = await collect(HookedStore(pair.store, hook), pair.blobs)
    assert report.errors == []
    for number, name in names.items():
        await pair.volume.rename(ROOT_INO, name, ROOT_INO, b"%d" % number)
    await pair.volume.settle()
    await assert_rewritten(pair, fh)
