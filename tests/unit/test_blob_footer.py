"""The seal: every single change of an object is noticed, and lengths can be computed back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.blobstore import CorruptBlob
from apollofs.blobstore.footer import (
    CHUNK_BYTES,
    check_chunks,
    data_length_of,
    footer_length,
    make_footer,
    parse_footer,
    sealed_length,
)
from apollofs.blobstore.memory import MemoryStore
from apollofs.blobstore.verify import UNSEALED, VerifyingStore

LENGTHS = st.one_of(st.integers(0, 1 << 40), st.integers(0, 1 << 20).map(lambda n: n * CHUNK_BYTES))


@given(LENGTHS)
def test_the_data_length_is_computed_back(length: int) -> None:
    assert data_length_of(sealed_length(length)) == length


@given(st.integers(0, 1 << 40))
def test_other_lengths_are_no_sealed_objects(length: int) -> None:
    found = data_length_of(length)
    assert found is None or sealed_length(found) == length


@given(st.binary(max_size=300), st.data())
def test_every_changed_bit_is_noticed(body: bytes, data: st.DataObject) -> None:
    sealed = bytearray(body + make_footer("n", body))
    assert len(sealed) == sealed_length(len(body))
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptBlob):
        check_chunks("n", parse_footer("n", len(body), sealed[len(body) :]), 0, sealed[: len(body)])


def test_a_footer_belongs_to_a_name_and_a_length() -> None:
    footer = make_footer("n", b"body")
    assert len(footer) == footer_length(4)
    with pytest.raises(CorruptBlob, match="another name"):
        parse_footer("m", 4, footer)
    with pytest.raises(CorruptBlob, match="holds 4 bytes, not 5"):
        parse_footer("n", 5, footer)


@pytest.mark.parametrize(("offset", "length", "requests"), [(0, None, 1), (-10, 10, 1), (0, 10, 2)])
async def test_requests_of_a_part(offset: int, length: int | None, requests: int) -> None:
    body = bytes(8 * CHUNK_BYTES)
    inner = CountingStore()
    store = VerifyingStore(inner)
    await store.put("n", body)
    await store.read_block("n", len(body), offset % len(body), length)
    assert inner.reads == requests
    await store.read_block("n", len(body), offset % len(body), length)
    assert inner.reads == requests + 1


async def test_the_remembered_footers_are_bounded() -> None:
    body = bytes(8 * CHUNK_BYTES)
    store = VerifyingStore(CountingStore(), footers_max=3)
    for number in range(10):
        await store.put(str(number), body)
        await store.read_block(str(number), len(body), 0, 1)
    assert len(store._footers) == 3


async def test_objects_of_somebody_else() -> None:
    inner = MemoryStore()
    await inner.put("junk", b"short")
    await inner.put("long", bytes(100))
    store = VerifyingStore(inner)
    assert [found.size_bytes async for found in store.list()] == [UNSEALED, 100 - footer_length(1)]
    for name in ("junk", "long"):
        with pytest.raises(CorruptBlob):
            await store.read(name)
        with pytest.raises(CorruptBlob):
            await store.read_block(name, 10)
    with pytest.raises(CorruptBlob):
        await store.stat("junk")


class CountingStore(MemoryStore):
    reads = 0

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads += 1
        return await super().read(name, offset, length)
