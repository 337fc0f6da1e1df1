"""What an S3 server's answer means, the same for both clients."""

from __future__ import annotations

from typing import Final

from .errors import (
    BlobStoreError,
    BlobStoreFull,
    BlobStoreRefused,
    BlobStoreTimeout,
    BlobStoreUnavailable,
    NoSuchBlob,
    RangeUnavailable,
)

_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "TooManyObjects"})
"""radosgw answers QuotaExceeded with 403, so codes are looked at before the status."""

_TRANSIENT: Final = frozenset(
    {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "OperationAborted", "ServiceUnavailable"}
)
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "InvalidBucketName"})


def error_of_status(status: int, code: str, what: str) -> BlobStoreError:
    """The leaf for an HTTP `status` and S3 error `code` (may be empty). `what` says what was tried, and where.

    Messages hold nothing of the server's text: it may quote the request's signature.
    """
    text = f"{what}: {status} {code}".rstrip()
    if code in _FULL or status == 507:
        return BlobStoreFull(text)
    if code in _NO_BUCKET:
        return BlobStoreRefused(f"{text}; create the bucket, or let `apollofs format` do it")
    if code in _TRANSIENT or status in (408, 409, 425, 429) or status >= 500:
        return BlobStoreUnavailable(text)
    if status == 404:
        return NoSuchBlob(text)
    if status == 416:
        return RangeUnavailable(text)
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return BlobStoreRefused(f"{text}; check the AWS credentials of this host")
    if code == "RequestTimeTooSkewed":
        return BlobStoreRefused(f"{text}; check the clock of this host")
    if 300 <= status < 400:
        return BlobStoreRefused(f"{text}; check the endpoint and the region")
    return BlobStoreRefused(text)


def connection_error(what: str, timed_out: bool) -> BlobStoreError:
    """The leaf for a request that got no answer, or an answer that broke off."""
    if timed_out:
        return BlobStoreTimeout(f"{what}: the server did not answer in time")
    return BlobStoreUnavailable(f"{what}: the connection failed or broke off")
