"""One open file: what is read back and what is committed, while others change it too."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreFull, BlobStoreRefused
from apollofs.fs.errors import BodyLost, BodyUnavailable
from apollofs.metadata.errors import FileTooLarge, InvalidArgument, OutcomeUnknown
from apollofs.metadata.records import FILE_BYTES_MAX, SetAttr
from tests.support.bodies import Mount, World, body_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path) as made:
        yield made


@pytest.fixture
async def mount(world: World) -> AsyncIterator[Mount]:
    async with world.mount() as made:
        yield made


# -- failing ----------------------------------------------------------------------------------------------------------


async def test_a_failed_commit_leaves_everything_for_the_next(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 1000)
    world.blobs.fail_puts = [BlobStoreRefused("no")]
    with pytest.raises(BodyUnavailable):
        await file.commit()
    assert file.is_dirty
    await file.commit()
    assert await mount.content(file.ino) == b"x" * 1000


async def test_a_full_store_is_said_to_be_full(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"x" * 1000)
    world.blobs.fail_puts = [BlobStoreFull("full")]
    with pytest.raises(BlobStoreFull):
        await file.commit()


async def test_a_commit_has_a_deadline(world: World, mock_clock: trio.testing.MockClock) -> None:
    async with world.mount("slow", commit_deadline_s=2.0) as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"x" * 1000)

        async def expire() -> None:
            mock_clock.jump(2.1)
            await trio.sleep_forever()

        world.blobs.before_put = expire
        with pytest.raises(BodyUnavailable):
            await file.commit()
        world.blobs.before_put = None
        await file.commit()
        assert await mount.content(file.ino) == b"x" * 1000


@pytest.mark.parametrize("fault", ["lost", "applied"])
async def test_an_append_whose_commit_got_no_answer_happens_once(mount: Mount, fault: str) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.append(b"a" * 200)
    await file.commit()
    mount.volume.faults = [fault]
    await file.append(b"b" * 50)
    with pytest.raises(OutcomeUnknown):
        await file.commit()
    await file.append(b"c")
    await file.commit()
    assert await mount.content(file.ino) == b"a" * 200 + b"b" * 50 + b"c"


async def test_a_cancelled_commit_can_be_repeated(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.append(b"x" * 1000)
    for hook in ("put", "commit"):
        with trio.CancelScope() as scope:

            async def cancel(scope: trio.CancelScope = scope) -> None:
                scope.cancel()
                await trio.lowlevel.checkpoint()

            world.blobs.before_put = cancel if hook == "put" else None
            mount.volume.before_commit = cancel if hook == "commit" else None
            await file.commit()
        assert scope.cancelled_caught
    mount.volume.before_commit = None
    await file.commit()
    assert await mount.content(file.ino) == b"x" * 1000


async def test_a_lost_session_drops_what_is_dirty_and_tells_each_handle_once(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"kept")
    await file.commit()
    one, two, clean = file.errors.cursor(), file.errors.cursor(), await mount.bodies.open(await mount.create(b"g"))
    await file.write(0, b"lost")
    mount.bodies.session_lost()
    with pytest.raises(BodyLost):
        await file.write(0, b"more", one)
    with pytest.raises(BodyLost):
        await file.commit(two)
    await file.write(4, b"!", one)
    await file.commit(two)
    assert await mount.content(file.ino) == b"kept!"
    await clean.commit(clean.errors.cursor())


async def test_a_session_that_is_lost_amid_a_commit(world: World, mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    cursor = file.errors.cursor()
    await file.append(b"x" * 1000, cursor)

    async def lose() -> None:
        world.blobs.before_put = None
        mount.bodies.session_lost()

    world.blobs.before_put = lose
    with pytest.raises(BodyLost):
        await file.commit(cursor)
    await file.commit(cursor)
    assert file.size_bytes == 0
    await file.append(b"y", cursor)
    await file.commit(cursor)
    assert await mount.content(file.ino) == b"y"


# -- orphans ----------------------------------------------------------------------------------------------------------


async def test_an_orphan_lives_on_here_and_commits_nothing(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    await file.write(0, b"a" * 500)
    await file.commit()
    await mount.volume.inner.unlink(1, b"f")
    file.orphan()
    commits = len(mount.volume.commits)
    await file.write(400, b"b" * 200)
    await file.append(b"c")
    await file.truncate(SetAttr(size_bytes=590))
    await file.punch(10, 480, keep_size=True)
    await file.grow(700)
    await file.commit()
    assert await file.read(0, 1000) == b"a" * 10 + bytes(480) + b"b" * 100 + bytes(110)
    assert not file.is_dirty
    assert len(mount.volume.commits) == commits


async def test_a_file_that_was_unlinked_elsewhere_becomes_an_orphan(world: World, mount: Mount) -> None:
    async with world.mount("b") as other:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, b"a" * 500)
        await other.volume.inner.unlink(1, b"f")
        await file.commit()
        assert file.orphaned
        await file.truncate(SetAttr(size_bytes=3))
        assert await file.read(0, 1000) == b"aaa"


async def test_sizes_past_the_largest_are_refused(mount: Mount) -> None:
    file = await mount.bodies.open(await mount.create())
    with pytest.raises(FileTooLarge):
        await file.write(FILE_BYTES_MAX, b"x")
    with pytest.raises(FileTooLarge):
        await file.grow(FILE_BYTES_MAX + 1)
    with pytest.raises(FileTooLarge):
        await file.punch(FILE_BYTES_MAX, 1, keep_size=False)
    with pytest.raises(InvalidArgument):
        await file.punch(0, 0, keep_size=True)
    await file.write(FILE_BYTES_MAX - 1, b"x")
    await file.commit()
    assert (await mount.volume.inner.getattr(file.ino)).size_bytes == FILE_BYTES_MAX
