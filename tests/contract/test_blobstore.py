"""What every blob store does: in memory, in a directory, in a real S3 by both clients, bare and with all wrappers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio

from apollofs.blobstore import BadBlobName, BlobStore, BlockStore, CorruptBlob, NoSuchBlob, RangeUnavailable
from apollofs.blobstore.footer import CHUNK_BYTES, footer_of, pack_footer, sealed_length
from tests.contract.blob_backends import (
    BARE,
    WRAPPED,
    S3Place,
    aws_credentials,
    location_of,
    opened,
    opened_wrapped,
    s3_place,
)
from tests.support.radosgw_server import shared_gateway

pytestmark = pytest.mark.contract

BODY = bytes(range(256)) * 40
LARGE = bytes(range(251)) * (5 * CHUNK_BYTES // 251 + 100)
"""Several chunks and a part of one; a period that no power of two shares."""


@pytest.fixture(scope="module")
def place(pytestconfig: pytest.Config) -> Iterator[S3Place]:
    found = s3_place(shared_gateway(pytestconfig))
    with aws_credentials(found.user):
        yield found


@pytest.fixture(params=[*BARE, *WRAPPED])
async def store(request: pytest.FixtureRequest, place: S3Place, tmp_path: Path) -> AsyncIterator[BlobStore]:
    location = location_of(request.param, place, tmp_path / "blobs")
    async with opened(request.param, location) as found:
        yield found


@pytest.fixture(params=WRAPPED)
async def blocks(request: pytest.FixtureRequest, place: S3Place, tmp_path: Path) -> AsyncIterator[BlockStore]:
    location = location_of(request.param, place, tmp_path / "blobs")
    async with opened_wrapped(location) as found:
        yield found


async def names(store: BlobStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [found.name async for found in store.list(prefix, start_after)]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview], ids=["bytes", "bytearray", "memoryview"])
async def test_what_was_put_is_read(store: BlobStore, kind: Any) -> None:
    for body in (b"", b"x", BODY, LARGE):
        await put_and_read(store, body, kind)


async def put_and_read(store: BlobStore, body: bytes, kind: Any) -> None:
    await store.put("a/b.c-d_e", kind(body))
    found = await store.read("a/b.c-d_e")
    assert isinstance(found, bytes)
    assert found == body
    stat = await store.stat("a/b.c-d_e")
    assert (stat.name, stat.size_bytes) == ("a/b.c-d_e", len(body))
    assert stat.modified_s > 1.6e9


async def test_a_put_again_is_harmless(store: BlobStore) -> None:
    await store.put("twice", BODY)
    await store.put("twice", BODY)
    assert await store.read("twice") == BODY
    assert await names(store) == ["twice"]


async def test_a_range_is_exact(store: BlobStore) -> None:
    await store.put("r", BODY)
    size = len(BODY)
    for offset, end in [(0, 1), (0, size), (5, 15), (5, size), (size - 1, size), (7, 7), (size, size)]:
        assert await store.read("r", offset, end - offset) == BODY[offset:end]
    for offset in (0, 5, size - 1, size):
        assert await store.read("r", offset) == BODY[offset:]


async def test_a_range_beyond_the_end_is_an_error(store: BlobStore) -> None:
    await store.put("r", BODY)
    size = len(BODY)
    for offset, length in [(0, size + 1), (size - 1, 2), (size, 1), (size + 1, 0), (size + 1, None), (1 << 40, 5)]:
        with pytest.raises(RangeUnavailable):
            await store.read("r", offset, length)


async def test_a_block_can_be_sealed_by_its_writer(blocks: BlockStore) -> None:
    room = bytearray(sealed_length(len(LARGE)))
    room[: len(LARGE)] = LARGE
    room[len(LARGE) :] = pack_footer("sealed", footer_of(LARGE))
    await blocks.put_sealed("sealed", memoryview(room))
    room[:10] = bytes(10)
    assert await blocks.read("sealed") == LARGE
    assert await blocks.read_block("sealed", len(LARGE), 5, 100) == LARGE[5:105]


async def test_a_part_of_a_block_is_exact(blocks: BlockStore) -> None:
    size = len(LARGE)
    ranges = [
        (0, 10),
        (CHUNK_BYTES - 5, CHUNK_BYTES + 5),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (3, 4 * CHUNK_BYTES),
        (size - 7, size),
        (size - CHUNK_BYTES - 7, size - CHUNK_BYTES),
        (0, size),
        (2 * CHUNK_BYTES + 1, size),
        (17, 17),
        (size, size),
    ]
    for number, (offset, end) in enumerate(ranges):
        name = f"block/{number}"
        await blocks.put(name, LARGE)
        # Twice: the second time its checksums may be remembered.
        for _ in range(2):
            found = await blocks.read_block(name, size, offset, end - offset)
            assert found.readonly
            assert bytes(found) == LARGE[offset:end]
            assert await blocks.read(name, offset, end - offset) == LARGE[offset:end]
        assert bytes(await blocks.read_block(name, size, offset)) == LARGE[offset:]


@pytest.mark.expects_log("corrupt data")
async def test_a_block_is_fetched_whole_with_its_checksums(blocks: BlockStore) -> None:
    for body in (b"x", BODY, LARGE):
        await blocks.put("whole", body)
        found, footer = await blocks.fetch_block("whole", len(body), lambda data, sums: (bytes(data), sums))
        assert found == body
        assert footer == footer_of(body)
        sealed = await blocks.fetch_block("whole", len(body), lambda data, _: memoryview(data.obj).cast("B"))
        await blocks.delete("whole")
        await blocks.put_sealed("whole", sealed.toreadonly())
        assert await blocks.read("whole") == body
    with pytest.raises(CorruptBlob):
        await blocks.fetch_block("whole", len(LARGE) + 1, lambda data, sums: None)
    with pytest.raises(NoSuchBlob):
        await blocks.fetch_block("absent", 1, lambda data, sums: None)


async def test_a_block_ends_where_it_is_said_to_end(blocks: BlockStore) -> None:
    await blocks.put("block", LARGE)
    with pytest.raises(RangeUnavailable):
        await blocks.read_block("block", len(LARGE), len(LARGE) - 1, 2)


async def test_what_is_not_there(store: BlobStore) -> None:
    for offset, length in ((0, None), (0, 5), (5, None), (0, 0)):
        with pytest.raises(NoSuchBlob):
            await store.read("none", offset, length)
    with pytest.raises(NoSuchBlob):
        await store.stat("none")
    await store.delete("none")
    await store.delete("none/of/these")
    await store.put("is", BODY)
    with pytest.raises(NoSuchBlob):
        await store.read("is/not")


async def test_delete(store: BlobStore) -> None:
    await store.put("d/x", BODY)
    await store.put("d/y", BODY)
    await store.delete("d/x")
    with pytest.raises(NoSuchBlob):
        await store.read("d/x")
    assert await names(store) == ["d/y"]


async def test_a_name_may_be_the_beginning_of_another(store: BlobStore) -> None:
    every = sorted(["a", "a/b", "a/b/c", "a-b", "a.b", "a0", "a_b", "A", "ab", "ab/c"])
    for name in every:
        await store.put(name, name.encode())
    for name in every:
        assert await store.read(name) == name.encode()
    assert await names(store) == every
    assert await names(store, "a") == [name for name in every if name.startswith("a")]
    assert await names(store, "a/") == ["a/b", "a/b/c"]
    assert await names(store, "a/b") == ["a/b", "a/b/c"]
    assert await names(store, "ab/c") == ["ab/c"]
    assert await names(store, "zz") == []
    for name in [*every, "a/", "a/a", "a/b/", "0", "zz"]:
        assert await names(store, "", name) == [other for other in every if other > name]
        assert await names(store, "a", name) == [other for other in every if other > name and other[0] == "a"]


async def test_a_long_list_comes_whole_and_in_order(store: BlobStore) -> None:
    """More than one page of every store, while others put and delete."""
    every = sorted(f"{number % 16:x}/{number}" for number in range(1100))
    limit = trio.CapacityLimiter(8)

    async def put(name: str) -> None:
        async with limit:
            await store.put(name, b"")

    async with trio.open_nursery() as nursery:
        for name in every:
            nursery.start_soon(put, name)
    seen: list[str] = []
    async with aclosing(store.list()) as found:  # type: ignore[type-var]
        async for stat in found:
            assert stat.size_bytes == 0
            seen.append(stat.name)
            if len(seen) == 10:
                await store.delete(every[5])
                await store.delete(every[-1])
                await store.put("ffff", b"")
    assert [name for name in seen if name not in (every[-1], "ffff")] == every[:-1]
    assert seen == sorted(seen)


async def test_a_list_may_be_left(store: BlobStore) -> None:
    for name in ("a", "b", "c"):
        await store.put(name, b"")
    async with aclosing(store.list()) as found:  # type: ignore[type-var]
        async for stat in found:
            assert stat.name == "a"
            break
    assert await names(store) == ["a", "b", "c"]


BAD_NAMES = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a b", "a+b", "a\0b", "é", "a\n", "x" * 201]


async def test_bad_names_are_refused_by_all(store: BlobStore) -> None:
    for name in [*BAD_NAMES, "a/" * 350 + "a"]:
        for call in (store.read, store.stat, store.delete):
            with pytest.raises(BadBlobName):
                await call(name)
        with pytest.raises(BadBlobName):
            await store.put(name, b"")
    assert await names(store) == []


async def test_the_longest_names(store: BlobStore) -> None:
    name = "/".join(["x" * 200] * 3 + ["y" * 97])
    assert len(name) == 700
    await store.put(name, BODY)
    assert await store.read(name) == BODY
    assert await names(store, name[:400]) == [name]


async def test_many_at_once(store: BlobStore) -> None:
    async def turn(number: int) -> None:
        body = number.to_bytes(2, "big") * 50_000
        await store.put(f"many/{number}", body)
        assert await store.read(f"many/{number}") == body
        assert await store.read(f"many/{number}", 777, 1000) == body[777:1777]

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(turn, number)


async def test_a_reader_sees_all_of_a_put_or_nothing(store: BlobStore) -> None:
    """Also of a put that is cancelled, at whatever moment."""

    async def put(name: str) -> None:
        with trio.move_on_after(0.0005 * int(name)):
            await store.put(name, LARGE)
        try:
            assert await store.read(name) == LARGE
        except NoSuchBlob:
            pass  # the put had not got so far

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(put, str(number))
    for stat in [stat async for stat in store.list()]:
        assert stat.size_bytes == len(LARGE)


async def test_every_method_is_cancelled_at_once(store: BlobStore) -> None:
    await store.put("a", BODY)
    with trio.CancelScope() as scope:
        scope.cancel()
        for call in (store.read, store.stat, store.delete):
            await call("a")
    assert scope.cancelled_caught
    assert await store.read("a") == BODY
