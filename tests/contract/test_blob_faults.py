"""A broken S3, by both clients: what helps is tried again, the rest is the right error, wrong bytes never leave."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import trio

from apollofs.blobstore import (
    BlobMetrics,
    BlobStoreError,
    BlobStoreFull,
    BlobStoreOptions,
    BlobStoreRefused,
    BlobStoreTimeout,
    BlobStoreUnavailable,
    CorruptBlob,
    NoSuchBlob,
    RetryPolicy,
    S3Location,
    open_blob_store,
    prepare_blob_store,
)
from apollofs.blobstore.port import BlobStore
from apollofs.fs.embedded import free_ports
from tests.contract.blob_backends import FAST, S3Place, aws_credentials, opened, opened_wrapped, s3_place
from tests.support.radosgw_server import RadosGateway, S3User, shared_gateway
from tests.support.s3_faults import Fault, FaultyS3, Kind, Request

pytestmark = [pytest.mark.contract, pytest.mark.faults]

BODY = bytes(range(251)) * 9000
NAME = "ab/block"

ONCE = replace(FAST, retry=RetryPolicy(deadline_s=20.0, first_backoff_s=60.0, backoff_max_s=60.0))
"""Half of the first pause is longer than the deadline: one attempt only."""

IMPATIENT = replace(FAST, read_timeout_s=1.0)


def patience(kind: Kind) -> BlobStoreOptions:
    """What a client waits for under this fault. Only who gets no answer has to give up, and nobody else does: a machine
    with much to do must not look like a server that hangs.
    """
    return IMPATIENT if kind in ("hang", "stall") else FAST


METHODS = {"PUT": "put", "GET": "read", "HEAD": "stat", "DELETE": "delete"}


def called(request: Request) -> str:
    """The port's method behind a request."""
    return "list" if "list-type" in request.path else METHODS[request.method]


@dataclass(frozen=True)
class Broken:
    """A client's location behind a proxy that spoils what it is told to spoil."""

    client: str
    location: S3Location
    direct: S3Location
    faulty: FaultyS3


@pytest.fixture(scope="module")
def gateway(pytestconfig: pytest.Config) -> RadosGateway:
    return shared_gateway(pytestconfig)


@pytest.fixture(scope="module")
def place(gateway: RadosGateway) -> Iterator[S3Place]:
    found = s3_place(gateway)
    with aws_credentials(found.user):
        yield found


@pytest.fixture(params=["boto3", "obstore"])
def broken(request: pytest.FixtureRequest, place: S3Place) -> Iterator[Broken]:
    with FaultyS3.serving(place.location.endpoint) as faulty:
        direct = place.using(request.param)
        yield Broken(request.param, replace(direct, endpoint=faulty.endpoint), direct, faulty)


PASSING = [
    Fault("status", status=500, code="InternalError", times=2),
    Fault("status", status=503, code="SlowDown", times=3),
    Fault("status", status=429, code="TooManyRequests", times=2),
    Fault("status", status=400, code="RequestTimeout"),
    Fault("reset", times=2),
    Fault("lost_reply", times=2),
    Fault("hang"),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}-{fault.status}")
async def test_what_passes_is_tried_again(broken: Broken, fault: Fault) -> None:
    metrics = BlobMetrics()
    async with opened_wrapped(broken.location, patience(fault.kind), metrics) as store:
        broken.faulty.clear()  # of the requests that made the bucket
        broken.faulty.add(replace(fault, method="PUT"))
        await store.put(NAME, BODY)
        broken.faulty.add(replace(fault, method="GET"))
        assert await store.read(NAME) == BODY
        # A HEAD has no body for a code: there a 400 can mean anything.
        broken.faulty.add(replace(fault, method="HEAD", status=max(fault.status, 429)))
        assert (await store.stat(NAME)).size_bytes == len(BODY)
        broken.faulty.add(replace(fault, method="GET", path="list-type"))
        assert [found.name async for found in store.list()] == [NAME]
        broken.faulty.add(replace(fault, method="DELETE"))
        await store.delete(NAME)
    assert [request.fault for request in broken.faulty.requests if request.fault] == [fault.kind] * fault.times * 5
    counts = metrics.snapshot()
    assert {method for method, outcome in counts.calls if outcome == "ok"} == {"put", "read", "stat", "list", "delete"}
    retries: Counter[str] = Counter()
    for (method, _), times in counts.retries.items():
        retries[method] += times
    asked = Counter(called(request) for request in broken.faulty.requests)
    assert retries == {method: times - 1 for method, times in asked.items()}
    if fault.kind != "hang":  # a client that gives up may do so before a slow answer too
        assert set(retries.values()) == {fault.times}


BODY_FAULTS: list[Kind] = ["truncate", "reset_body", "stall"]


@pytest.mark.parametrize("kind", BODY_FAULTS)
async def test_a_body_that_breaks_off_is_read_again(broken: Broken, kind: Kind) -> None:
    async with opened_wrapped(broken.location, patience(kind)) as store:
        await store.put(NAME, BODY)
        broken.faulty.add(Fault(kind, method="GET", times=2))
        assert await store.read(NAME) == BODY
        broken.faulty.add(Fault(kind, method="GET", times=1))
        assert bytes(await store.read_block(NAME, len(BODY), 100_000, 50)) == BODY[100_000:100_050]
    assert sum(request.fault == kind for request in broken.faulty.requests) == 3


async def test_boto3_resumes_a_broken_body_by_range(place: S3Place) -> None:
    with FaultyS3.serving(place.location.endpoint) as faulty:
        async with opened("boto3", place.using("boto3", faulty.endpoint)) as store:
            await store.put(NAME, BODY)
            faulty.clear()
            faulty.add(Fault("truncate", method="GET", times=2))
            assert await store.read(NAME) == BODY
            ranges = [request.range for request in faulty.requests]
            assert ranges[0] == ""
            assert all(each.startswith("bytes=") for each in ranges[1:])
            assert len(ranges) == 3
            faulty.add(Fault("truncate", method="GET", times=100))
            with pytest.raises(BlobStoreUnavailable):
                await store.read(NAME)


@pytest.mark.expects_log("read again after corrupt data")
@pytest.mark.parametrize("position", [0, len(BODY) // 2, -1, -20, -60])
async def test_a_bit_that_flips_on_its_way_is_read_again(broken: Broken, position: int) -> None:
    metrics = BlobMetrics()
    async with opened_wrapped(broken.location, FAST, metrics) as store:
        await store.put(NAME, BODY)
        broken.faulty.add(Fault("flip", method="GET", position=position, times=2))
        assert await store.read(NAME) == BODY
    assert metrics.snapshot().retries == {("read", "CorruptBlob"): 2}


@pytest.mark.expects_log("corrupt data")
async def test_what_stays_corrupt_is_an_error_that_names_the_chunk(broken: Broken) -> None:
    options = replace(FAST, retry=replace(FAST.retry, deadline_s=2.0))
    async with opened_wrapped(broken.location, options) as store:
        await store.put(NAME, BODY)
        broken.faulty.add(Fault("flip", method="GET", position=(1 << 18) + 5, times=1000))
        with pytest.raises(CorruptBlob, match=r"'ab/block': chunk 1 "):
            await store.read(NAME)
        broken.faulty.clear()
        broken.faulty.add(Fault("short", method="GET", times=1000))
        with pytest.raises(BlobStoreError):
            await store.read(NAME)
        with pytest.raises(BlobStoreError):
            await store.read_block(NAME, len(BODY), 10, 10)


async def test_a_server_that_ignores_ranges_is_not_believed(broken: Broken) -> None:
    async with opened_wrapped(broken.location, ONCE) as store:
        await store.put(NAME, BODY)
        broken.faulty.add(Fault("ignore_range", method="GET", times=1000))
        with pytest.raises(BlobStoreUnavailable):
            await store.read_block(NAME, len(BODY), 1 << 20, 10)


ENDINGS = [
    (Fault("status", status=500), BlobStoreUnavailable),
    (Fault("status", status=503, code="SlowDown"), BlobStoreUnavailable),
    (Fault("reset"), BlobStoreUnavailable),
    (Fault("hang"), BlobStoreTimeout),
    (Fault("status", status=507, code="InsufficientStorage"), BlobStoreFull),
    (Fault("status", status=403, code="AccessDenied"), BlobStoreRefused),
    (Fault("status", status=301, code="PermanentRedirect"), BlobStoreRefused),
    (Fault("status", status=400, code="ExpiredToken"), BlobStoreRefused),
]


@pytest.mark.parametrize(("fault", "error"), ENDINGS, ids=lambda each: getattr(each, "kind", ""))
async def test_what_does_not_pass_ends_as_the_right_error(
    broken: Broken, fault: Fault, error: type[BlobStoreError]
) -> None:
    options = replace(patience(fault.kind), retry=ONCE.retry)
    async with opened_wrapped(broken.location, options) as store:
        await store.put(NAME, BODY)
        broken.faulty.add(replace(fault, times=1000))
        for call in (store.read, store.stat, store.delete):
            with pytest.raises(error) as caught:
                await call(NAME)
            assert type(caught.value) is error
            assert "\n" not in str(caught.value)
        with pytest.raises(error):
            await store.put("other", BODY)
        with pytest.raises(error):
            assert [found async for found in store.list()] == []
        broken.faulty.clear()
        assert await store.read(NAME) == BODY


async def test_the_deadline_ends_the_retries(broken: Broken) -> None:
    policy = RetryPolicy(deadline_s=0.5, first_backoff_s=0.01, backoff_max_s=0.02)
    async with opened_wrapped(broken.location, replace(FAST, retry=policy)) as store:
        broken.faulty.add(Fault("status", method="PUT", status=500, times=100_000))
        with pytest.raises(BlobStoreUnavailable):
            await store.put(NAME, BODY)
        assert broken.faulty.count("PUT") > 2
        broken.faulty.add(Fault("hang", times=1000))
        with pytest.raises(BlobStoreTimeout, match=r"0\.5 s"):
            await store.read(NAME)


async def test_one_call_has_a_deadline_of_its_own(broken: Broken) -> None:
    options = replace(ONCE, read_timeout_s=0.4, connect_timeout_s=0.4, call_deadline_s=0.5)
    async with opened(broken.client, broken.location) as setup:
        await setup.put(NAME, BODY)
    broken.faulty.add(Fault("hang", method="GET", times=1000))
    store = await open_blob_store(broken.location, options)
    with pytest.raises(BlobStoreTimeout):
        await store.read(NAME)
    await store.aclose()


async def test_a_cancelled_put_leaves_all_or_nothing(broken: Broken) -> None:
    async with opened_wrapped(broken.location) as store:
        for kind in ("hang", "lost_reply"):
            name = f"cancelled/{kind}"
            broken.faulty.add(Fault(kind, method="PUT", times=1000))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.put, name, BODY)
                while not any(name in request.path for request in list(broken.faulty.requests)):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            broken.faulty.clear()
        with pytest.raises(NoSuchBlob):
            await store.read("cancelled/hang")
        try:
            assert await store.read("cancelled/lost_reply") == BODY
        except NoSuchBlob:
            pass


async def test_nobody_listens(place: S3Place) -> None:
    (port,) = free_ports(1)
    for client in ("boto3", "obstore"):
        store = await open_blob_store(place.using(client, f"http://127.0.0.1:{port}"), ONCE)
        with pytest.raises(BlobStoreUnavailable, match=rf"bucket 'contract' at http://127\.0\.0\.1:{port}"):
            await store.read(NAME)
        await store.aclose()


async def test_wrong_keys(place: S3Place) -> None:
    location = place.using("obstore")
    secret = secrets.token_hex(20)
    for user in (S3User("", place.user.access_key, secret), S3User("", "AKNOBODY", secret)):
        with aws_credentials(user):
            with pytest.raises(BlobStoreRefused) as caught:
                await prepare_blob_store(location, FAST, create=True)
            messages = [str(caught.value)]
            for client in ("boto3", "obstore"):
                store = await open_blob_store(replace(location, client=client), FAST)
                for call in (store.read, store.stat, store.delete):
                    with pytest.raises(BlobStoreRefused) as caught:
                        await call(NAME)
                    messages.append(str(caught.value))
                assert secret not in repr(store)
                await store.aclose()
        for message in messages:
            assert "bucket 'contract' at http://127.0.0.1" in message
            assert secret not in message
            assert user.access_key not in message


async def test_no_credentials_at_all(place: S3Place) -> None:
    with aws_credentials(None), pytest.raises(BlobStoreRefused, match="AWS_ACCESS_KEY_ID"):
        await open_blob_store(place.using("obstore"), FAST)


@pytest.mark.parametrize("client", ["boto3", "obstore"])
async def test_no_such_bucket(place: S3Place, client: str) -> None:
    location = replace(place.using(client), bucket="no-such-bucket")
    with pytest.raises(BlobStoreRefused, match="no bucket 'no-such-bucket'"):
        await prepare_blob_store(location, FAST, create=False)
    store = await open_blob_store(location, FAST)
    for call in (store.read, store.stat, store.delete):
        with pytest.raises(BlobStoreRefused):
            await call(NAME)
    with pytest.raises(BlobStoreRefused):
        await store.put(NAME, BODY)
    with pytest.raises(BlobStoreRefused):
        assert [found async for found in store.list()] == []
    await store.aclose()


async def test_a_bucket_is_made_once_and_left_clean(place: S3Place) -> None:
    location = replace(place.using("boto3"), bucket=f"made-{secrets.token_hex(4)}", prefix="")
    await prepare_blob_store(location, FAST, create=True)
    await prepare_blob_store(location, FAST, create=True)
    await prepare_blob_store(location, FAST, create=False)
    async with opened("boto3", location) as store:
        assert [found async for found in store.list()] == []


async def test_somebody_elses_bucket(gateway: RadosGateway, place: S3Place) -> None:
    with aws_credentials(gateway.create_user("stranger")), pytest.raises(BlobStoreRefused):
        await prepare_blob_store(place.using("obstore"), FAST, create=True)


async def put_many(store: BlobStore) -> None:
    """More objects than the quota allows."""
    for number in range(20):
        await store.put(str(number), b"x")


@pytest.mark.parametrize("client", ["boto3", "obstore"])
async def test_a_quota_is_reached(gateway: RadosGateway, place: S3Place, client: str) -> None:
    user = gateway.create_user(f"poor-{client}")
    gateway.set_quota(user.uid, objects_max=3)
    with aws_credentials(user):
        location = replace(place.using(client), bucket=f"poor-{client}")
        async with opened_wrapped(location) as store:
            with pytest.raises(BlobStoreFull):
                await put_many(store)


@pytest.mark.slow
@pytest.mark.parametrize("client", ["boto3", "obstore"])
async def test_a_server_that_restarts_amid_work(gateway: RadosGateway, place: S3Place, client: str) -> None:
    """Every put that returned is there, whole, after the gateway has died and come back."""
    patient = replace(FAST, retry=RetryPolicy(deadline_s=60.0, first_backoff_s=0.05, backoff_max_s=0.5))
    async with opened_wrapped(place.using(client), patient) as store:
        bodies = {f"w/{number}": secrets.token_bytes(100_000) for number in range(60)}

        async def write(names: list[str]) -> None:
            for name in names:
                await store.put(name, bodies[name])

        async with trio.open_nursery() as nursery:
            for first in range(4):
                nursery.start_soon(write, sorted(bodies)[first::4])
            await trio.to_thread.run_sync(gateway.stop_gateway)
            await trio.to_thread.run_sync(gateway.start_gateway)
        for name, body in bodies.items():
            assert await store.read(name) == body
