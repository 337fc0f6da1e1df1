"""Commits whose caller heard no outcome: the journal tells it, whatever others have done to the file since."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from apollofs.fs.open_file import OpenFile
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.fates import FATES_MAX, Fate, Fates
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.records import ROOT_INO, Body, SetAttr
from tests.support.bodies import BLOCK, Mount, World, mount, opened_there, world
from tests.support.collecting import as_others_read_it

__all__ = ["mount", "world"]
KINDS = ["daemon", "passthrough"]
DATA = random.Random(1).randbytes(5 * BLOCK)


async def opened(mount: Mount, kind: str, content: bytes = b"") -> OpenFile:
    """A new file with committed bytes, open for writing."""
    file = await mount.bodies.open(await mount.create())
    if kind == "passthrough":
        file = mount.bodies.pass_through(file)
    if content:
        await file.write(0, content)
        await file.commit()
    return file


async def commit_in_doubt(mount: Mount, file: OpenFile, fault: str) -> None:
    mount.volume.faults = [fault]
    with pytest.raises(OutcomeUnknown):
        await file.commit()


async def elsewhere(world: World, act: Callable[[OpenFile], Awaitable[object]]) -> None:
    """Another mount does something to the file, and commits."""
    async with world.mount("other") as other:
        there = await opened_there(other)
        await act(there)
        await there.commit()
        other.bodies.release(there)


async def cut_to_nothing(there: OpenFile) -> None:
    await there.truncate(SetAttr(size_bytes=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["applied", "lost"])
async def test_what_was_cut_elsewhere_after_it_was_applied_is_not_committed_again(
    world: World, mount: Mount, kind: str, fault: str
) -> None:
    file = await opened(mount, kind)
    await file.write(0, DATA)
    await commit_in_doubt(mount, file, fault)
    await elsewhere(world, cut_to_nothing)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == (b"" if fault == "applied" else DATA)


@pytest.mark.parametrize("kind", KINDS)
async def test_of_what_is_forgotten_the_blobs_are_not_used_again(world: World, mount: Mount, kind: str) -> None:
    """Many other files were committed meanwhile: nobody knows any more, and the blobs may be garbage."""
    file, data = await opened(mount, kind), DATA * 80
    await file.write(0, data)
    for _ in range(2):
        for upload in await file.ready_uploads():
            await upload()
    await commit_in_doubt(mount, file, "applied")
    mount.volume.session.fates._known.clear()
    await elsewhere(world, cut_to_nothing)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["applied", "lost"])
async def test_an_append_is_there_once_whatever_others_append(
    world: World, mount: Mount, kind: str, fault: str
) -> None:
    """Theirs begins as ours; a long one moves the body out of its inode."""
    for number, theirs in enumerate((b"line\nmore\n", random.Random(2).randbytes(200))):
        if number:
            await mount.volume.inner.unlink(ROOT_INO, b"f")
        file = await opened(mount, kind)
        await file.append(b"line\n")
        await commit_in_doubt(mount, file, fault)

        async def append(there: OpenFile, data: bytes = theirs) -> None:
            await there.append(data)

        await elsewhere(world, append)
        await file.commit()
        expected = b"line\n" + theirs if fault == "applied" else theirs + b"line\n"
        assert await as_others_read_it(world, file.ino) == expected
        mount.bodies.release(file)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_append_is_there_once_though_others_have_stored_its_bytes_anew(
    world: World, mount: Mount, kind: str
) -> None:
    """A working copy elsewhere stores whole blocks, so that nothing in the store is ours any more."""
    async with world.mount("other") as other:
        there = other.bodies.pass_through(await other.bodies.open(await other.create()))
        os.pwrite(there.copy.fd, b"." * 300, 0)
        await there.commit()
        file = await opened_there(mount)
        await file.append(b"<record>")
        await commit_in_doubt(mount, file, "applied")
        os.pwrite(there.copy.fd, b"H", 0)
        await there.commit()
        await file.append(b"<next>")
        await file.commit()
        assert await as_others_read_it(world, file.ino) == b"H" + b"." * 299 + b"<record><next>"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_sync_that_was_interrupted_while_it_was_applied(world: World, mount: Mount, kind: str) -> None:
    file = await opened(mount, kind)
    await file.write(0, DATA)
    mount.volume.faults = ["hangs"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.commit)
        await mount.volume.hanging.wait()
        nursery.cancel_scope.cancel()
    await elsewhere(world, cut_to_nothing)
    await file.commit()
    assert await as_others_read_it(world, file.ino) == b""


async def test_a_look_settles_what_was_in_doubt_when_it_began_and_nothing_later(
    world: World, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the newest body is read a commit settles it, and is followed by one of unknown outcome, too."""
    file = await opened(mount, "daemon", b"0" * 300)
    await file.append(b"A" * 100)
    await commit_in_doubt(mount, file, "lost")
    read_body = mount.volume.read_body

    async def read_before_others(ino: int) -> Body:
        monkeypatch.setattr(mount.volume, "read_body", read_body)
        body = await read_body(ino)
        await file.commit()
        await file.append(b"B" * 100)
        await commit_in_doubt(mount, file, "applied")
        return body

    monkeypatch.setattr(mount.volume, "read_body", read_before_others)
    async with world.mount("other") as other:
        there = await opened_there(other)
        await there.append(b"T" * 100)
        await there.commit()
    await mount.bodies.refresh(file, await mount.volume.inner.getattr(file.ino))
    await file.commit()
    found = await as_others_read_it(world, file.ino)
    assert sorted((found[at], found.count(found[at])) for at in range(0, len(found), 100)) == sorted(
        [(ord("0"), 300)] * 3 + [(ord(each), 100) for each in "ABT"]
    )


def test_fates_are_told_and_forgotten() -> None:
    fates, sent = Fates(), SlotRecord(1, 1, 0, (Change(Kind.COMMIT, 7, size_bytes=10), Change(Kind.UNLINK, 8)))
    assert fates.of(7) is None
    fates.begin(7)
    assert fates.of(7) == Fate(applied=False, size_bytes=0), "it was not sent"
    fates.sent(sent)
    assert fates.of(7) is None
    fates.tell(sent, applied=True)
    assert (fates.of(7), fates.of(8)) == (Fate(applied=True, size_bytes=10), None)
    for ino in range(100, 100 + FATES_MAX):
        fates.begin(ino)
    assert fates.of(7) is None and fates.of(100 + FATES_MAX - 1) is not None
