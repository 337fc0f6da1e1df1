"""Files that are read and written by passthrough, and what must not reach the local files behind them."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.fs.errors import BodyUnavailable
from apollofs.metadata.records import ROOT_INO, SetAttr
from tests.support.bodies import World, body_world
from tests.support.filesystems import USER, Pair, close, create, pair

__all__ = ["pair"]
BLOCK = 1 << 18
DATA = random.Random(3).randbytes(9 * BLOCK + 1000)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made


class Device:
    """A kernel that keeps what it is given."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}

    def backing_open(self, fd: int) -> int:
        number = len(self.fds) + 1
        self.fds[number] = os.dup(fd)
        return number

    def backing_close(self, number: int) -> None:
        os.close(self.fds[number])


async def test_what_the_kernel_writes_is_what_is_looked_at(world: World) -> None:
    """Two mounts of a node have one cache: what one was writing becomes an image only if nobody reads that by now."""
    async with world.mount() as a, world.mount() as b:
        written = b.bodies.pass_through(await b.bodies.open(await b.create()))
        os.pwrite(written.copy.fd, DATA, 0)
        await written.commit()
        await a.volume.inner.lookup(ROOT_INO, b"f")
        file = await a.bodies.open(written.ino)
        await a.bodies.orders.warm(file.body, 0, len(DATA))
        image = await a.bodies.images.open(file.body)
        assert image is not None
        b.bodies.release(written)
        backing_fd = os.dup(image.fd)
        try:
            changed = a.bodies.make_private(file, image)
            assert os.path.samestat(os.fstat(backing_fd), os.fstat(changed.copy.fd))
        finally:
            os.close(backing_fd)


async def test_an_image_that_was_replaced_is_not_changed_in_place(world: World) -> None:
    async with world.mount() as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, DATA)
        await file.commit()
        await mount.bodies.orders.warm(file.body, 0, len(DATA))
        image = await mount.bodies.images.open(file.body)
        assert image is not None
        await trio.Path(image.path).rename(image.path + ".gone")
        await trio.Path(image.path).write_bytes(DATA)
        with pytest.raises(BlockingIOError):
            mount.bodies.make_private(file, image)
        assert await trio.Path(image.path).read_bytes() == DATA
        mount.bodies.images.release(image)


async def test_nothing_is_fetched_into_what_a_process_writes(world: World) -> None:
    """A file is warmed, or verified, while it begins to be changed in place."""
    async with world.mount() as mount:
        file = await mount.bodies.open(await mount.create())
        await file.write(0, DATA)
        await file.commit()
        body = file.body
        await mount.bodies.orders.warm(body, 0, len(DATA))
        image = await mount.bodies.images.open(body)
        assert image is not None
        changed = mount.bodies.make_private(file, image)
        os.pwrite(changed.copy.fd, bytes(BLOCK), 3 * BLOCK)
        image._verified[:] = bytes(len(image._verified))  # as after a remount
        await image.ensure(0, len(DATA))
        assert os.pread(changed.copy.fd, BLOCK, 3 * BLOCK) == bytes(BLOCK)
        await changed.commit()
        assert (await mount.content(changed.ino))[3 * BLOCK : 4 * BLOCK] == bytes(BLOCK)
        mount.bodies.images.release(image)


@pytest.mark.parametrize("how", ["open", "truncate"])
async def test_nobody_begins_to_read_what_is_being_cut(pair: Pair, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollofs.fs.passing.QUIET_NS", 0)
    fs, device = pair.here, Device()
    made, fh = await create(fs)
    for at in range(0, len(DATA), 1 << 20):
        await fs.write(fh, at, DATA[at : at + (1 << 20)])
    await close(fs, fh)
    await fs.cache_orders.warm(await pair.volume.read_body(made.ino), 0, len(DATA))
    fs.passing.attach(device, negotiated=True)
    started, go_on = trio.Event(), trio.Event()
    setattr_, fhs = pair.volume.setattr, []

    async def slow(ino: int, change: SetAttr) -> object:
        started.set()
        await go_on.wait()
        return await setattr_(ino, change)

    monkeypatch.setattr(pair.volume, "setattr", slow)

    async def cut() -> None:
        if how == "open":
            fhs.append((await fs.open(made.ino, os.O_WRONLY | os.O_TRUNC, USER)).fh)
        else:
            await fs.setattr(made.ino, SetAttr(size_bytes=0))

    held = await fs._bodies.open(made.ino)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        await started.wait()
        reader = await fs.open(made.ino, os.O_RDONLY, USER)
        assert not reader.backing_id
        go_on.set()
    fs._bodies.release(held)
    assert await fs.read(reader.fh, 0, 10) == b""
    for fh in fhs:
        await fs.write(fh, 0, b"0123456789")
        await close(fs, fh)
        assert (await pair.volume.read_body(made.ino)).inode.size_bytes == 10
    await close(fs, reader.fh)


@pytest.mark.expects_log("could not be committed")
@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), RuntimeError("a bug")])
async def test_a_bug_in_one_file_does_not_end_the_mount(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with world.mount() as mount:
        file = mount.bodies.pass_through(await mount.bodies.open(await mount.create()))
        os.pwrite(file.copy.fd, DATA, 0)

        def fail(*_: object) -> object:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("apollofs.fs.stored_blocks.mmap.mmap", fail)
            with pytest.raises((BodyUnavailable, ExceptionGroup)):
                await mount.bodies.commit_all()
        await file.commit()
        assert await mount.content(file.ino) == DATA
