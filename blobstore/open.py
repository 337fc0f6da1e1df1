"""From a location to a store: which adapter, and the order of the wrappers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import trio

from .block_port import BlockStore
from .errors import BlobStoreRefused
from .limit import LimitingStore, Limits
from .local import LocalStore
from .metrics import BlobMetrics, MeteringStore
from .port import BlobStore
from .retry import RetryingStore, RetryPolicy
from .s3_options import S3Options
from .url import LocalLocation, Location, S3Location
from .verify import VerifyingStore


@dataclass(frozen=True, slots=True)
class BlobStoreOptions:
    """How this host uses a store; nothing of it is kept in etcd."""

    threads: int = 16
    """Blocking calls at once in the adapter."""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    """Longest silence of an S3 server."""
    call_deadline_s: float = 60.0
    """Longest duration of one attempt."""
    ca_file: str | None = None
    """PEM file of the authority that signed the S3 endpoint's certificate; None: the system's."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    limits: Limits = field(default_factory=Limits)


async def open_blob_store(
    location: Location, options: BlobStoreOptions, metrics: BlobMetrics | None = None
) -> BlockStore:
    """The store at `location`, with all wrappers. The caller closes it.

    Asks nothing of an S3 server yet; a local directory must exist (see `prepare_blob_store`).
    Raises `BlobStoreRefused` with one line for a person.
    """
    adapter = await open_adapter(location, options)
    if isinstance(adapter, LocalStore):
        await adapter.prepare(create=False)
    return wrap(adapter, options, metrics or BlobMetrics())


def wrap(adapter: BlobStore, options: BlobStoreOptions, metrics: BlobMetrics) -> BlockStore:
    """metrics(limit(retry(verify(adapter)))).

    Verify is innermost, so that a reread is a retry. Retry is within limit: a call that waits for its next attempt
    keeps its place, so a store in trouble isn't met by more callers than a healthy one, and memory stays bounded.
    Metrics are outermost: they count what the caller saw and waited for; retry reports to them by the way.
    """
    verified = VerifyingStore(adapter)
    retried = RetryingStore(verified, options.retry, on_retry=metrics.retried)
    return MeteringStore(LimitingStore(retried, options.limits), metrics)


async def prepare_blob_store(location: Location, options: BlobStoreOptions, create: bool) -> None:
    """For `format` and `site add`: check that bodies can be written, read and deleted at `location`.

    `create`: make a bucket or directory that is missing. Leaves no object behind.
    Raises `BlobStoreRefused` with one line for a person, `BlobStoreFull`, `BlobStoreUnavailable`.
    """
    if isinstance(location, LocalLocation):
        await LocalStore(location.directory).prepare(create)
        return
    from .s3 import open_boto3_store

    store = await open_boto3_store(location, _s3_options(options))
    try:
        await store.ensure_bucket(create)
    finally:
        await store.aclose()


async def open_adapter(location: Location, options: BlobStoreOptions) -> BlobStore:
    """The bare adapter: for tests and measurements; everybody else takes `open_blob_store`."""
    if isinstance(location, LocalLocation):
        return LocalStore(location.directory, threads=options.threads, deadline_s=options.call_deadline_s)
    return await _open_s3(location, options)


async def _open_s3(location: S3Location, options: BlobStoreOptions) -> BlobStore:
    # boto3 takes half a second to import: who keeps blobs in a directory shall not wait for it.
    from .s3 import open_boto3_store

    if location.client == "obstore" and not obstore_installed():
        raise BlobStoreRefused("client=obstore is asked for, but obstore isn't installed; `pip install obstore`")
    control = await open_boto3_store(location, _s3_options(options))
    if location.client == "boto3" or not obstore_installed():
        return control

    def build() -> BlobStore:
        from .s3_obstore import ObstoreStore

        return ObstoreStore(control)

    # it reads all certificates of the system
    return await trio.to_thread.run_sync(build)


def obstore_installed() -> bool:
    """Whether the fast client can be used on this host."""
    return importlib.util.find_spec("obstore") is not None


def _s3_options(options: BlobStoreOptions) -> S3Options:
    return S3Options(
        threads=options.threads,
        connect_timeout_s=options.connect_timeout_s,
        read_timeout_s=options.read_timeout_s,
        call_deadline_s=options.call_deadline_s,
        ca_file=options.ca_file,
    )
