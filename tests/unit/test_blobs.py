"""Blob names and block arithmetic, and stores that are opened when they are needed."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from apollofs.blobstore import BlobStoreRefused, BlockStore
from apollofs.blobstore.memory import MemoryStore
from apollofs.fs.blobs import Block, block_count, block_of, open_blob_source, site_of, spans
from apollofs.fs.errors import BodyUnavailable, CorruptBody, MissingBlob
from tests.support.bodies import BrokenBlobs

BLOB = (3 << 56) | 0x1234


@given(st.integers(1, 500), st.data())
def test_spans_cover_the_range(blob_length: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, blob_length))
    length = data.draw(st.integers(0, blob_length - offset))
    found = spans(BLOB, blob_length, offset, length, 64)
    covered = [span.block.index * 64 + span.offset + at for span in found for at in range(span.length)]
    assert covered == list(range(offset, offset + length))
    for span in found:
        assert span.block == block_of(BLOB, blob_length, span.block.index, 64)
        assert span.offset + span.length <= span.block.length
    blocks = [block_of(BLOB, blob_length, index, 64) for index in range(block_count(blob_length, 64))]
    assert sum(block.length for block in blocks) == blob_length


def test_ranges_past_the_blob_are_corrupt() -> None:
    with pytest.raises(CorruptBody):
        spans(BLOB, 100, 90, 11, 64)


def test_names_are_spread_and_tell_blob_and_block() -> None:
    names = {Block(blob, index, 1).name for blob in range(500) for index in range(3)}
    assert len(names) == 1500
    assert len({name[:2] for name in names}) > 200
    assert Block(BLOB, 255, 1).name.endswith("/0300000000001234/000000ff")
    assert site_of(BLOB) == 3


async def test_each_site_has_its_store_opened_once_and_closed() -> None:
    stores: dict[int, BrokenBlobs] = {}

    async def open_store(site: int) -> BlockStore:
        assert site not in stores
        stores[site] = BrokenBlobs(MemoryStore())
        await trio.lowlevel.checkpoint()
        return stores[site]

    first, second = Block(1 << 56, 0, 3), Block(2 << 56, 0, 3)
    async with open_blob_source(open_store, 64) as source:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(source.put_block, first, b"one")
        await source.put_block(second, b"two")
        assert bytes(await source.read_block(first)) == b"one"
        assert bytes(await source.read_block(second, 1, 1)) == b"w"
        with pytest.raises(MissingBlob):
            await source.read_block(Block(1 << 56, 1, 3))
    assert sorted(stores) == [1, 2]


async def test_a_store_that_can_not_be_opened_is_tried_again() -> None:
    failures = [BlobStoreRefused("no credentials")]

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        if failures:
            raise failures.pop()
        return BrokenBlobs(MemoryStore())

    async with open_blob_source(open_store, 64) as source:
        with pytest.raises(BodyUnavailable):
            await source.put_block(Block(1, 0, 1), b"x")
        await source.put_block(Block(1, 0, 1), b"x")
