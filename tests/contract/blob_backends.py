"""The stores that the blob contract is checked on, bare and with all wrappers."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from apollofs.blobstore import (
    BlobMetrics,
    BlobStore,
    BlobStoreOptions,
    BlockStore,
    LocalLocation,
    Location,
    RetryPolicy,
    S3Location,
    prepare_blob_store,
)
from apollofs.blobstore.memory import MemoryStore
from apollofs.blobstore.open import open_adapter, wrap
from tests.support.radosgw_server import RadosGateway, S3User

BARE = ("memory", "local", "boto3", "obstore")
WRAPPED = tuple(f"wrapped-{kind}" for kind in BARE)

FAST = BlobStoreOptions(
    connect_timeout_s=2.0,
    read_timeout_s=10.0,
    call_deadline_s=30.0,
    retry=RetryPolicy(deadline_s=30.0, first_backoff_s=0.001, backoff_max_s=0.01),
)
"""For tests: patient with the server, quick to try again."""


@dataclass(frozen=True)
class S3Place:
    """A user of the real server and a bucket that it owns."""

    user: S3User
    location: S3Location

    def using(self, client: str, endpoint: str = "") -> S3Location:
        """The bucket through `client` (obstore or boto3), under a prefix of its own, perhaps through a proxy."""
        assert client in ("obstore", "boto3")
        return replace(
            self.location,
            client=client,  # type: ignore[arg-type]  # checked above
            endpoint=endpoint or self.location.endpoint,
            prefix=f"{self.location.prefix}/{secrets.token_hex(6)}",
        )


@contextmanager
def aws_credentials(user: S3User | None) -> Iterator[None]:
    """Credentials by the usual chain, and only these: nothing of the host that runs the tests is seen.

    None: there are none at all.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        if user is None:
            patch.delenv("AWS_ACCESS_KEY_ID", raising=False)
            patch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
        else:
            patch.setenv("AWS_ACCESS_KEY_ID", user.access_key)
            patch.setenv("AWS_SECRET_ACCESS_KEY", user.secret_key)
        yield


def s3_place(gateway: RadosGateway) -> S3Place:
    """The suite's user and bucket; `prepare_blob_store` makes the bucket."""
    return S3Place(gateway.create_user("blobs"), S3Location("contract", "suite", gateway.endpoint, addressing="path"))


def location_of(kind: str, place: S3Place, directory: Path) -> Location | None:
    """None: memory."""
    base = kind.removeprefix("wrapped-")
    if base == "memory":
        return None
    return LocalLocation(str(directory)) if base == "local" else place.using(base)


@asynccontextmanager
async def opened(kind: str, location: Location | None, options: BlobStoreOptions = FAST) -> AsyncIterator[BlobStore]:
    """The store of one of `BARE` or `WRAPPED`, closed at the end."""
    if kind in WRAPPED:
        async with opened_wrapped(location, options) as wrapped:
            yield wrapped
        return
    adapter = await _adapter(location, options)
    try:
        yield adapter
    finally:
        await adapter.aclose()


@asynccontextmanager
async def opened_wrapped(
    location: Location | None, options: BlobStoreOptions = FAST, metrics: BlobMetrics | None = None
) -> AsyncIterator[BlockStore]:
    """As `open_blob_store` makes it."""
    store = wrap(await _adapter(location, options), options, metrics or BlobMetrics())
    try:
        yield store
    finally:
        await store.aclose()


async def _adapter(location: Location | None, options: BlobStoreOptions) -> BlobStore:
    if location is None:
        return MemoryStore()
    await prepare_blob_store(location, options, create=True)
    return await open_adapter(location, options)
