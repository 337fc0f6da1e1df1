"""Whole blocks received into memory that is used again: from a good S3 and a broken one, wrong bytes never leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio

from apollofs.blobstore import (
    BlobStoreError,
    BlobStoreFull,
    BlobStoreRefused,
    BlobStoreTimeout,
    BlobStoreUnavailable,
    BlockStore,
    CorruptBlob,
    NoSuchBlob,
    RetryPolicy,
    open_blob_store,
)
from apollofs.blobstore.footer import Footer
from apollofs.blobstore.rooms import LEAST_BYTES
from apollofs.fs.embedded import free_ports
from tests.contract.blob_backends import FAST, S3Place, aws_credentials, opened_wrapped, s3_place
from tests.support.radosgw_server import shared_gateway
from tests.support.s3_faults import Fault, FaultyS3

pytestmark = [pytest.mark.contract, pytest.mark.faults]

BODY = bytes(range(251)) * (3 * LEAST_BYTES // 251)
NAME = "ab/block"
IMPATIENT = replace(FAST, read_timeout_s=1.0)
ONCE = replace(FAST, retry=RetryPolicy(deadline_s=20.0, first_backoff_s=60.0, backoff_max_s=60.0))
"""Half of the first pause is longer than the deadline: one attempt only."""


@pytest.fixture(scope="module")
def place(pytestconfig: pytest.Config) -> Iterator[S3Place]:
    found = s3_place(shared_gateway(pytestconfig))
    with aws_credentials(found.user):
        yield found


@pytest.fixture
def faulty(place: S3Place) -> Iterator[FaultyS3]:
    with FaultyS3.serving(place.location.endpoint) as serving:
        yield serving


async def fetched(store: BlockStore, name: str = NAME, length: int = len(BODY)) -> bytes:
    def copy(data: memoryview, _: Footer) -> bytes:
        assert data.readonly
        return bytes(data)

    return await store.fetch_block(name, length, copy)


PASSING = [
    Fault("status", status=503, code="SlowDown", times=2),
    Fault("reset", times=2),
    Fault("lost_reply", times=2),
    Fault("hang"),
    Fault("truncate", times=2),
    Fault("reset_body", times=2),
    Fault("stall"),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.kind)
async def test_what_passes_is_tried_again(place: S3Place, faulty: FaultyS3, fault: Fault) -> None:
    patience = IMPATIENT if fault.kind in ("hang", "stall") else FAST
    async with opened_wrapped(place.using("obstore", faulty.endpoint), patience) as store:
        await store.put(NAME, BODY)
        faulty.add(replace(fault, method="GET"))
        assert await fetched(store) == BODY
        assert await fetched(store) == BODY
    assert sum(request.fault == fault.kind for request in faulty.requests) == fault.times


@pytest.mark.expects_log("corrupt data")
@pytest.mark.parametrize("position", [0, len(BODY) // 2, -1, -60])
async def test_a_bit_that_flips_on_its_way_is_read_again(place: S3Place, faulty: FaultyS3, position: int) -> None:
    options = replace(FAST, retry=replace(FAST.retry, deadline_s=2.0))
    async with opened_wrapped(place.using("obstore", faulty.endpoint), options) as store:
        await store.put(NAME, BODY)
        faulty.add(Fault("flip", method="GET", position=position, times=2))
        assert await fetched(store) == BODY
        faulty.add(Fault("flip", method="GET", position=position, times=1000))
        with pytest.raises(CorruptBlob):
            await fetched(store)


ENDINGS = [
    (Fault("status", status=500), BlobStoreUnavailable),
    (Fault("reset"), BlobStoreUnavailable),
    (Fault("hang"), BlobStoreTimeout),
    (Fault("status", status=507, code="InsufficientStorage"), BlobStoreFull),
    (Fault("status", status=403, code="AccessDenied"), BlobStoreRefused),
    (Fault("status", status=301, code="PermanentRedirect"), BlobStoreRefused),
    (Fault("status", status=404, code="NoSuchBucket"), BlobStoreRefused),
    (Fault("status", status=404, code="NoSuchKey"), NoSuchBlob),
]


@pytest.mark.parametrize(("fault", "error"), ENDINGS, ids=lambda each: getattr(each, "code", ""))
async def test_what_does_not_pass_is_the_right_error(
    place: S3Place, faulty: FaultyS3, fault: Fault, error: type[BlobStoreError]
) -> None:
    options = replace(IMPATIENT if fault.kind == "hang" else FAST, retry=ONCE.retry)
    async with opened_wrapped(place.using("obstore", faulty.endpoint), options) as store:
        await store.put(NAME, BODY)
        faulty.add(replace(fault, method="GET", times=1000))
        with pytest.raises(error) as caught:
            await fetched(store)
        assert type(caught.value) is error
        assert "Signature" not in str(caught.value)
        faulty.clear()
        assert await fetched(store) == BODY


@pytest.mark.expects_log("corrupt data")
async def test_a_shorter_object_is_not_taken_for_the_block(place: S3Place) -> None:
    async with opened_wrapped(place.using("obstore"), ONCE) as store:
        await store.put(NAME, BODY[:-1])
        with pytest.raises(CorruptBlob):
            await fetched(store)


@pytest.mark.expects_log("corrupt data")
async def test_a_longer_object_is_not_taken_for_the_block(place: S3Place) -> None:
    async with opened_wrapped(place.using("obstore"), ONCE) as store:
        await store.put(NAME, BODY + b"x")
        with pytest.raises(CorruptBlob):
            await fetched(store)
        await store.put("other", BODY)
        assert await fetched(store, "other") == BODY


async def test_a_connection_that_the_server_has_closed_is_made_anew(place: S3Place, faulty: FaultyS3) -> None:
    async with opened_wrapped(place.using("obstore", faulty.endpoint), ONCE) as store:
        await store.put(NAME, BODY)
        assert await fetched(store) == BODY
        faulty.disconnect()
        assert await fetched(store) == BODY


async def test_who_gives_up_leaves_no_thread_behind(place: S3Place, faulty: FaultyS3) -> None:
    """With one thread for the adapter, the next call would wait for the server's silence to end."""
    options = replace(FAST, threads=1, read_timeout_s=30.0)
    async with opened_wrapped(place.using("obstore", faulty.endpoint), options) as store:
        await store.put(NAME, BODY)
        faulty.add(Fault("stall", method="GET"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetched, store)
            while not any(request.fault == "stall" for request in list(faulty.requests)):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        with trio.fail_after(20):
            assert await fetched(store) == BODY


async def test_nobody_listens(place: S3Place) -> None:
    (port,) = free_ports(1)
    store = await open_blob_store(place.using("obstore", f"http://127.0.0.1:{port}"), ONCE)
    with pytest.raises(BlobStoreUnavailable, match=f"127.0.0.1:{port}"):
        await fetched(store)
    await store.aclose()
