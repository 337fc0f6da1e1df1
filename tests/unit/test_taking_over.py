"""Taking over what other mounts commit into a working copy: interrupted, beside appends, and after a commit of unknown
outcome."""

from __future__ import annotations

import os
import random
from functools import partial

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.open_file import OpenFile
from apollofs.fs.passed_file import PassedFile
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.records import ROOT_INO
from tests.support.bodies import BLOCK, Mount, World, mount, world

__all__ = ["mount", "world"]
BASE = random.Random(1).randbytes(4 * BLOCK)


@pytest.fixture
async def file(mount: Mount) -> PassedFile:
    """Written by passthrough, and committed."""
    file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
    assert os.pwrite(file.copy.fd, BASE, 0) == len(BASE)
    await file.commit()
    return file


async def opened_there(other: Mount) -> OpenFile:
    return await other.bodies.open((await other.volume.inner.lookup(ROOT_INO, b"f")).ino)


async def test_an_append_of_unknown_outcome_is_there_once(mount: Mount, file: PassedFile) -> None:
    await file.append(b"once;")
    mount.volume.faults = ["applied"]
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))  # as a stat does
    assert bytes(await file.read(0, 1 << 20)) == BASE + b"once;"
    await file.commit()
    assert await mount.content(file.ino) == BASE + b"once;"


async def test_an_append_of_unknown_outcome_that_another_follows(world: World, mount: Mount, file: PassedFile) -> None:
    await file.append(b"ours")
    mount.volume.faults = ["applied"]
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.append(b"theirs")
        await there.commit()
    await file.append(b"more")
    await file.commit()
    assert await mount.content(file.ino) == BASE + b"ourstheirsmore"


async def test_taking_over_goes_on_where_it_was_interrupted(world: World, mount: Mount, file: PassedFile) -> None:
    async with world.mount("other") as other:
        there = await opened_there(other)
        for number, data in ((0, b"VERSION1"), (2, b"Z")):
            await there.write(number * BLOCK, data)
        await there.append(b"theirs")
        await there.commit()
        await file.append(b"ours")
        reads = 0

        async def fail_at(last: int) -> None:
            nonlocal reads
            reads += 1
            if reads == last:
                raise BlobStoreUnavailable("away")

        for last in range(1, 12):
            reads = 0
            world.blobs.before_read = partial(fail_at, last)
            try:
                await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
            except BodyUnavailable:
                continue
            break
        world.blobs.before_read = None
        assert last > 2, "it was never interrupted"
        await there.write(0, b"VERSION2")
        await there.commit()
        os.pwrite(file.copy.fd, b"mine", 3 * BLOCK)
        await file.commit()
        expected = bytearray(BASE)
        expected[:8], expected[2 * BLOCK : 2 * BLOCK + 1], expected[3 * BLOCK : 3 * BLOCK + 4] = (
            b"VERSION2",
            b"Z",
            b"mine",
        )
        assert await mount.content(file.ino) == bytes(expected) + b"theirsours"


async def test_an_append_waits_for_what_is_being_taken_over(world: World, mount: Mount, file: PassedFile) -> None:
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.write(0, b"X")
        await there.commit()
        entered, go_on = trio.Event(), trio.Event()

        async def wait() -> None:
            entered.set()
            await go_on.wait()

        world.blobs.before_read = wait
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.bodies.refresh, file, await mount.volume.inner.getattr(file.ino))
            await entered.wait()
            nursery.start_soon(file.append, b"ours")
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        world.blobs.before_read = None
        await there.append(b"theirs")
        await there.commit()
        await file.commit()
    assert (await mount.content(file.ino))[4 * BLOCK :] == b"theirsours"
