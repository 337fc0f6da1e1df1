"""Images: files that equal bodies byte for byte, shared, bounded, verified, and no error because of their disk."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.blobstore.footer import footer_of
from apollofs.fs.errors import BodyUnavailable, CorruptBody, MissingBlob
from apollofs.fs.images import Image, body_key
from apollofs.fs.images import map_file as map_module
from apollofs.fs.images.files import ImageFile, ImageFiles
from apollofs.metadata import extents
from apollofs.metadata.records import Body, Extent
from tests.support.bodies import Mount, World, body_world

BLOCK = 1 << 18
SIZE = 5 * BLOCK + 1000
BLOCKS = 6


def content(seed: int, size: int = SIZE) -> bytes:
    return (bytes((at * 31 + seed) % 251 for at in range(5021)) * (size // 5021 + 1))[:size]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with body_world(tmp_path, block_bytes=BLOCK) as made:
        yield made


async def stored(mount: Mount, data: bytes, name: bytes = b"f") -> Body:
    """A committed file of one extent, nothing of which is cached."""
    file = await mount.bodies.open(await mount.create(name))
    await file.write(0, data)
    await file.commit()
    mount.bodies.release(file)
    await mount.bodies.cache.settle()
    await mount.bodies.cache.make_room(1 << 40)
    return await mount.volume.read_body(file.ino)


async def opened(mount: Mount, body: Body) -> Image:
    image = await mount.bodies.images.open(body)
    assert image is not None
    return image


async def whole(mount: Mount, body: Body) -> bytes:
    """Fetch all of a body, and what its image then holds."""
    image = await opened(mount, body)
    await image.ensure(0, image.size_bytes)
    assert image.is_complete
    found = os.pread(image.fd, image.size_bytes + 1, 0)
    mount.bodies.images.release(image)
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_an_image_is_the_body_byte_for_byte(world: World) -> None:
    data = content(1)
    async with world.mount() as mount:
        body = await stored(mount, data)
        assert not mount.bodies.images.find(body)
        world.blobs.reads.clear()
        assert await whole(mount, body) == data
        assert mount.bodies.images.find(body)
        assert len(world.blobs.reads) == BLOCKS
        image = await opened(mount, body)
        assert image.trusted
        assert [image.footer(index) for index in (0, 5)] == [footer_of(data[:BLOCK]), footer_of(data[5 * BLOCK :])]
        assert os.pread(image.fd, 10, 100) == data[100:110]


async def test_holes_stay_holes(world: World) -> None:
    async with world.mount() as mount:
        (extent,) = (await stored(mount, content(2))).inode.extents
        inode = (await mount.volume.read_body(await mount.create(b"holes"))).inode
        layout = (replace(extent, offset=0, length=100), replace(extent, offset=8 * BLOCK + 7))
        body = Body(inode._replace(size_bytes=20 * BLOCK, extents=layout))
        expected = content(2)[:100].ljust(8 * BLOCK + 7, b"\0") + content(2)
        assert await whole(mount, body) == expected.ljust(20 * BLOCK, b"\0")
        image = await opened(mount, body)
        assert os.stat(image.path).st_blocks * 512 < 8 * BLOCK
        assert os.lseek(image.fd, BLOCK, os.SEEK_DATA) == 8 * BLOCK


async def test_the_key_says_all_that_the_bytes_depend_on(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(3))
        (extent,) = body.inode.extents
        clone = body._replace(inode=body.inode._replace(ino=body.inode.ino + 1, body_version=9))
        assert body_key(clone) == body_key(body) == f"{extent.blob:016x}"
        punched = extents.punch(body.inode.extents, 10, 10)
        others = [
            body._replace(inode=body.inode._replace(extents=punched)),
            body._replace(inode=body.inode._replace(extents=extents.punch(punched, 50, 1))),
            body._replace(inode=body.inode._replace(size_bytes=SIZE + 1)),
            body._replace(inode=body.inode._replace(size_bytes=SIZE - 1, extents=(replace(extent, length=SIZE - 1),))),
        ]
        assert len({body_key(one) for one in (body, *others)}) == 5


async def test_blocks_are_fetched_once_for_all_who_wait(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(4))
        world.blobs.reads.clear()
        go_on = trio.Event()
        world.blobs.before_read = go_on.wait
        async with trio.open_nursery() as nursery:
            impatient = trio.CancelScope()

            async def give_up() -> None:
                with impatient:
                    await mount.bodies.reader.pread(body, 0, SIZE)

            nursery.start_soon(give_up)
            for _ in range(4):
                nursery.start_soon(mount.bodies.reader.pread, body, 0, SIZE)
            await trio.testing.wait_all_tasks_blocked()
            impatient.cancel()
            go_on.set()
        assert impatient.cancelled_caught
        assert len(world.blobs.reads) == BLOCKS
        assert await mount.content(body.inode.ino) == content(4)


async def test_a_reader_has_its_block_before_the_others_come(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(5))
        image = await opened(mount, body)
        never = trio.Event()

        async def hold_all_but_the_first() -> None:
            if not world.blobs.reads[-1][0].endswith("/00000000"):
                await never.wait()

        world.blobs.before_read = hold_all_but_the_first
        image.prefetch(0, SIZE)
        assert bytes(await image.read(5, 10, whole=True)) == content(5)[5:15]
        assert not image.is_complete
        assert not image.trusted


async def test_every_waiter_gets_the_error(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(6))
        image = await opened(mount, body)
        world.blobs.fail_reads = [BlobStoreUnavailable("down")]
        with pytest.raises(BodyUnavailable):
            await image.ensure(0, BLOCK)
        await image.ensure(0, BLOCK)
        (extent,) = body.inode.extents
        gone = body._replace(inode=body.inode._replace(extents=(replace(extent, blob=extent.blob + 99),)))
        with pytest.raises(MissingBlob):
            await whole(mount, gone)


@pytest.mark.expects_log("corrupt data")
async def test_bad_bytes_of_the_store_are_never_handed_out(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(7))
        (name, *_) = sorted(world.blobs.raw._blobs)
        world.blobs.corrupt(name)
        with pytest.raises(CorruptBody):
            await whole(mount, body)


async def test_it_survives_a_remount(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(8))
        await whole(mount, body)
        used = mount.bodies.images.bytes_used
    world.blobs.reads.clear()
    async with world.mount() as mount:
        assert abs(mount.bodies.images.bytes_used - used) <= 2 * 4096  # whole pages of the disk
        assert mount.bodies.images.find(body)
        assert await mount.bodies.reader.pread(body, 0, SIZE) == content(8)
        image = await opened(mount, body)
        assert image.trusted
    assert world.blobs.reads == []


@pytest.mark.expects_log("is damaged and is fetched again")
@pytest.mark.parametrize("by", ["read", "ensure", "verify"])
async def test_what_is_damaged_is_fetched_again(world: World, by: str) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(9))
        await whole(mount, body)
        path = Path(mount.bodies.images._files.path(body_key(body)))
    overwrite(path, 2 * BLOCK + 5, b"\xff\xfe")
    async with world.mount() as mount:
        image = await opened(mount, body)
        assert not image.trusted
        if by == "read":
            assert await mount.bodies.reader.pread(body, 0, SIZE) == content(9)
        elif by == "ensure":
            await image.ensure(2 * BLOCK, 1)
        else:
            assert await image.verify()
        await image.settle()
        assert os.pread(image.fd, SIZE, 0) == content(9)


@pytest.mark.parametrize("damage", ["record", "header", "cut", "no map", "no image", "short"])
async def test_a_damaged_map_is_a_block_or_an_image_that_is_not_there(world: World, damage: str) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(10))
        await whole(mount, body)
        path = Path(mount.bodies.images._files.path(body_key(body)))
    map_path = path.with_name(path.name + ".map")
    data = map_path.read_bytes()
    at = {"record": len(data) - 3, "header": 20}.get(damage, 0)
    map_path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at else data)
    if damage == "cut":
        map_path.write_bytes(data[:-1])
    elif damage == "short":
        os.truncate(path, SIZE - 1)
    elif damage.startswith("no"):
        (map_path if damage == "no map" else path).unlink()
    async with world.mount() as mount:
        assert await whole(mount, body) == content(10)


async def test_mounts_share_what_is_there(world: World) -> None:
    async with world.mount() as one, world.mount() as two:
        body = await stored(one, content(11))
        late, early = await opened(two, body), await opened(one, body)
        await early.ensure(0, SIZE)
        world.blobs.reads.clear()
        assert bytes(await late.read(0, SIZE, whole=True)) == content(11)
        assert late.is_complete
        assert world.blobs.reads == []


async def test_what_anybody_has_open_stays(world: World) -> None:
    async with world.mount() as one, world.mount() as two:
        body, other = await stored(one, content(12)), await stored(one, content(13), b"g")
        for wanted in (body, other):
            await whole(one, wanted)
        held = await opened(two, body)
        await one.bodies.cache.settle()
        await one.bodies.cache.make_room(1 << 40)
        assert two.bodies.images.find(body)
        assert not two.bodies.images.find(other)
        two.bodies.images.release(held)
        held = await opened(one, body)
        await one.bodies.cache.settle()
        await one.bodies.cache.make_room(1 << 40)
        assert one.bodies.images.find(body)
        one.bodies.images.release(held)
        await one.bodies.cache.settle()
        await one.bodies.cache.make_room(1 << 40)
        assert not one.bodies.images.find(body)
        assert one.bodies.images.bytes_used == 0
        assert await whole(two, body) == content(12)


async def test_the_bound_holds_over_all(world: World) -> None:
    async with world.mount(cache_bytes_max=16 << 20) as mount:
        bodies = [await stored(mount, content(20 + at, 6 << 20), b"%d" % at) for at in range(4)]
        for body in bodies:
            await whole(mount, body)
            assert mount.bodies.images.bytes_used <= 16 << 20
        assert [mount.bodies.images.find(body) for body in bodies] == [False, False, True, True]


async def test_one_that_is_larger_than_the_bound_is_read_all_the_same(world: World) -> None:
    async with world.mount(cache_bytes_max=16 << 20) as mount:
        data = content(30, 17 << 20)
        body = await stored(mount, data)
        assert await mount.content(body.inode.ino) == data
        assert mount.bodies.images.bytes_used <= 16 << 20


async def test_the_directory_may_be_deleted_at_any_moment(world: World, tmp_path: Path) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(14))
        for _ in range(2):
            assert await whole(mount, body) == content(14)
            for path in sorted((tmp_path / "a" / "images").rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            assert await mount.content(body.inode.ino) == content(14)
        assert await whole(mount, body) == content(14)


@pytest.mark.expects_log("images are not cached as they should be", "block cache is not used where")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["open", "store"])
async def test_a_disk_that_fails_costs_no_read(
    world: World, monkeypatch: pytest.MonkeyPatch, error: int, where: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(error, "fails")

    async with world.mount() as mount:
        body = await stored(mount, content(15))
        monkeypatch.setattr(ImageFiles if where == "open" else ImageFile, where, fail)
        for _ in range(2):
            assert await mount.content(body.inode.ino) == content(15)
        assert not mount.bodies.images.find(body)
        monkeypatch.undo()
        assert await whole(mount, body) == content(15)


async def test_scattered_reads_take_ranges_until_a_block_is_worth_it(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(16))
        image = await opened(mount, body)
        world.blobs.reads.clear()
        for at in (100, 5000, 9000):
            assert bytes(await image.read(3 * BLOCK + at, 5, whole=False)) == content(16)[3 * BLOCK + at :][:5]
        assert [entry[1:] for entry in world.blobs.reads] == [(100, 5), (5000, 5), (0, None)]


async def test_trust_ends_with_a_change_and_with_the_boot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(17))
        await whole(mount, body)
        image = await opened(mount, body)
        os.chmod(image.path, 0o640)
        assert not image.trusted
        assert await image.verify()
    monkeypatch.setattr(map_module, "boot_id", lambda: bytes(16))
    async with world.mount() as mount:
        image = await opened(mount, body)
        assert image.is_complete
        assert not image.trusted
        assert await image.verify()


def fails(key: str) -> None:
    raise PermissionError(errno.EACCES, "refused", key)


async def test_detached_it_is_private_and_the_next_open_has_another(world: World) -> None:
    async with world.mount() as mount, world.mount() as other:
        body = await stored(mount, content(18))
        await whole(mount, body)
        image = await opened(mount, body)
        elsewhere = await opened(other, body)
        with pytest.raises(BlockingIOError):
            mount.bodies.images.detach(image)
        other.bodies.images.release(elsewhere)
        unlink = mount.bodies.images._files.unlink
        mount.bodies.images._files.unlink = fails  # type: ignore[method-assign]
        with pytest.raises(PermissionError):
            mount.bodies.images.detach(image)
        mount.bodies.images._files.unlink = unlink  # type: ignore[method-assign]
        assert not await other.bodies.images.drop(body_key(body))  # still shared, still in use
        mount.bodies.images.detach(image)
        assert not mount.bodies.images.find(body)
        os.pwrite(image.fd, b"changed", 0)
        assert await mount.content(body.inode.ino) == content(18)
        assert os.pread(image.fd, 7, 0) == b"changed"
        mount.bodies.images.release(image)
        assert mount.bodies.images.find(body)


async def test_the_image_of_a_clone_is_not_detached(world: World) -> None:
    async with world.mount() as mount:
        body = await stored(mount, content(19))
        image = await opened(mount, body)
        await opened(mount, body._replace(inode=body.inode._replace(ino=body.inode.ino + 1)))
        with pytest.raises(BlockingIOError):
            mount.bodies.images.detach(image)


async def test_a_finished_file_becomes_the_image(world: World, tmp_path: Path) -> None:
    data = content(21)
    async with world.mount() as mount:
        body = await stored(mount, data)
        finished = tmp_path / "a" / "finished"
        finished.write_bytes(data)
        footers = [footer_of(data[start : start + BLOCK]) for start in range(0, SIZE, BLOCK)]
        mount.bodies.images.adopt(str(finished), body, footers)
        assert not finished.exists()
        assert mount.bodies.images.find(body)
        world.blobs.reads.clear()
        image = await opened(mount, body)
        assert image.trusted
        assert await mount.content(body.inode.ino) == data
        assert world.blobs.reads == []


async def test_a_body_that_is_pieced_together(world: World) -> None:
    async with world.mount() as mount:
        first, second = await stored(mount, content(22)), await stored(mount, content(23), b"g")
        (one,), (two,) = first.inode.extents, second.inode.extents
        layout = (
            Extent(0, 3 * BLOCK, one.blob, 0, SIZE),
            Extent(3 * BLOCK, BLOCK + 77, two.blob, 50, SIZE),
            Extent(4 * BLOCK + 77, BLOCK, one.blob, 4 * BLOCK + 77, SIZE),
        )
        body = first._replace(inode=first.inode._replace(extents=layout, size_bytes=5 * BLOCK + 77))
        expected = content(22)[: 3 * BLOCK] + content(23)[50 : BLOCK + 127] + content(22)[4 * BLOCK + 77 :][:BLOCK]
        assert await whole(mount, body) == expected
        assert await mount.bodies.reader.pread(body, 10, 4 * BLOCK) == expected[10 : 4 * BLOCK + 10]


async def test_what_does_not_belong_there_goes_at_the_start(world: World, tmp_path: Path) -> None:
    junk = tmp_path / "a" / "images" / "ab" / "junk"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"x")
    os.utime(junk, (0, 0))
    async with world.mount():
        assert not junk.exists()


async def test_a_thread_that_was_left_behind_writes_nothing(tmp_path: Path) -> None:
    files = ImageFiles(str(tmp_path / "images"), 0)
    file = files.open("0" * 16, SIZE, BLOCK)
    right, wrong = memoryview(content(24)[:BLOCK]), memoryview(bytes(BLOCK))
    assert file.store(0, right, footer_of(right))
    assert not file.store(0, wrong, footer_of(wrong))
    file.close()
    assert not file.store(1, wrong, footer_of(wrong))
    again = files.open("0" * 16, SIZE, BLOCK)
    assert [again.map.has(index) for index in range(BLOCKS)] == [True] + [False] * 5
    assert os.pread(again.fd, BLOCK, 0) == right
    again.close()
