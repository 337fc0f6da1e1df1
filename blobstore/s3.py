"""Blobs in an S3 bucket by boto3: the whole port, and what no faster client does (credentials, bucket, listing).

This is the only module that imports boto3 and botocore. Where obstore is installed, bodies take `s3_obstore.py`; both
keep one set of facts, `s3_errors.py`.

A request is tried once here: `retry.py` alone repeats. The exception is a body that breaks off while it arrives, which
is resumed by a range, because what has come need not come again.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import boto3.session
import trio
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError

from .errors import BlobStoreError, BlobStoreRefused, BlobStoreUnavailable, NoSuchBlob, RangeUnavailable
from .names import check_name, check_prefix, check_range
from .port import BlobStat, BlobStore, Buffer
from .s3_errors import connection_error, error_of_status
from .s3_options import S3Options
from .threads import run_blocking
from .url import S3Location

T = TypeVar("T")

DEFAULT_REGION: Final = "us-east-1"
_PAGE: Final = 1000
_PIECE_BYTES: Final = 1 << 20
_RESUMES_MAX: Final = 3
_BROKEN_BODY: Final = (
    boto_errors.ReadTimeoutError,
    boto_errors.ResponseStreamingError,
    boto_errors.IncompleteReadError,
)
_REFUSED: Final = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.ProfileNotFound,
    boto_errors.ConfigParseError,
    boto_errors.SSLError,
    boto_errors.ParamValidationError,
)


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """One set of keys, for a moment. It has no repr, so that no log can hold it."""

    access_key: str
    secret_key: str
    token: str | None
    expires: bool
    """They come from a role and will be replaced; ask again after some minutes."""


class Boto3Store(BlobStore):
    """See `port.BlobStore`. Build it by `open_boto3_store`: the constructor may block on files."""

    def __init__(self, location: S3Location, options: S3Options) -> None:
        self.location = location
        self.options = options
        self._base = f"{location.prefix}/" if location.prefix else ""
        self._limiter = trio.CapacityLimiter(options.threads)
        self._session = boto3.session.Session()
        self.region = location.region or self._session.region_name or DEFAULT_REGION
        self._client: Any = self._session.client("s3", **self._client_options())
        # S3 of one's own answers "100 Continue" late or never: a wait before each body, for nothing.
        self._client.meta.events.unregister("before-call.s3", add_expect_header)
        self.endpoint: str = self._client.meta.endpoint_url

    def _client_options(self) -> dict[str, Any]:
        location, options = self.location, self.options
        return {
            "region_name": self.region,
            "endpoint_url": location.endpoint or None,
            "verify": options.ca_file,
            "config": Config(
                # Every object carries checksums of ours; S3's would hash each body once or twice more.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"payload_signing_enabled": False, "addressing_style": location.addressing},
                signature_version="s3v4",
                connect_timeout=options.connect_timeout_s,
                read_timeout=options.read_timeout_s,
                max_pool_connections=options.threads + 2,
                tcp_keepalive=True,
                retries={"total_max_attempts": 1, "mode": "standard"},
            ),
        }

    def credentials(self) -> Credentials:
        """The keys as of now; blocks (it may ask the instance's role). Raises `BlobStoreRefused` if there are none."""
        found = self._session.get_credentials()
        if found is None:
            raise BlobStoreRefused(
                f"no AWS credentials for {self.location.where}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or give the host an instance role"
            )
        frozen = found.get_frozen_credentials()
        # botocore renews credentials that have a method for it; the others never change.
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token, hasattr(found, "refresh_needed"))

    async def ensure_bucket(self, create: bool) -> None:
        """Check that the bucket exists, made now if `create`, and that objects can be written, read and deleted.

        Leaves nothing behind. Raises `BlobStoreRefused` with one line for a person, `BlobStoreFull`,
        `BlobStoreUnavailable`.
        """
        where = self.location.where
        if not await self.bucket_exists():
            if not create:
                raise BlobStoreRefused(f"there is no {where}; create it, or let `apollofs format` do it")
            await self._run(self._create_bucket, f"create {where}")
        probe = f"probe-{secrets.token_hex(8)}"
        body = secrets.token_bytes(32)
        await self.put(probe, body)
        try:
            if await self.read(probe) != body:
                raise BlobStoreRefused(f"{where} returned other bytes than were written; is it an S3 server?")
        finally:
            await self.delete(probe)

    async def bucket_exists(self) -> bool:
        """Whether the bucket is there. Raises `BlobStoreRefused` where these credentials may not know."""
        try:
            await self._run(
                partial(self._client.head_bucket, Bucket=self.location.bucket), f"look for {self.location.where}"
            )
        except NoSuchBlob:
            return False
        return True

    async def put(self, name: str, data: Buffer) -> None:
        body = data if isinstance(data, bytes) else bytes(data)  # a thread left behind keeps bytes of its own
        call = partial(self._client.put_object, Bucket=self.location.bucket, Key=self.key(name), Body=body)
        await self._run(call, self.what("write", name))

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length)
        key, what = self.key(name), self.what("read", name)
        if length == 0:
            return await self.read_nothing(name, offset)
        try:
            return await self._run(partial(self._read, key, what, offset, length), what)
        except RangeUnavailable:
            if length is None:
                return await self.read_nothing(name, offset)
            raise

    async def read_into(self, name: str, length: int, then: Callable[[Buffer], T]) -> T:
        key, what = self.key(name), self.what("read", name)
        return await self._run(lambda: then(self._read(key, what, 0, length)), what)

    async def read_nothing(self, name: str, offset: int) -> bytes:
        """The empty range at `offset`, which HTTP cannot ask for. Raises as `read`."""
        found = await self.stat(name)
        if offset > found.size_bytes:
            raise RangeUnavailable(f"{self.what('read', name)}: it has {found.size_bytes} bytes, not {offset}")
        return b""

    async def stat(self, name: str) -> BlobStat:
        what = self.what("stat", name)
        call = partial(self._client.head_object, Bucket=self.location.bucket, Key=self.key(name))
        try:
            answer = await self._run(call, what)
        except NoSuchBlob:
            await self.explain_missing(what)
            raise
        return BlobStat(name, answer["ContentLength"], answer["LastModified"].timestamp())

    async def explain_missing(self, what: str) -> None:
        """HEAD answers 404 without a reason: raise `BlobStoreRefused` if it is the bucket that is missing."""
        if not await self.bucket_exists():
            raise BlobStoreRefused(f"{what}: the bucket is gone")

    async def delete(self, name: str) -> None:
        call = partial(self._client.delete_object, Bucket=self.location.bucket, Key=self.key(name))
        try:
            await self._run(call, self.what("delete", name))
        except NoSuchBlob:
            return

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        check_prefix(prefix)
        request: dict[str, Any] = {
            "Bucket": self.location.bucket,
            "Prefix": self._base + prefix,
            "StartAfter": self._base + start_after if start_after else "",
            "MaxKeys": _PAGE,
        }
        what = f"list {prefix!r} in {self.location.where}"
        while True:
            answer = await self._run(partial(self._client.list_objects_v2, **request), what)
            found = answer.get("Contents", [])
            for entry in found:
                name = entry["Key"].removeprefix(self._base)
                yield BlobStat(name, entry["Size"], entry["LastModified"].timestamp())
            if not answer.get("IsTruncated") or not found:
                return
            # Continuing by name rather than by token: it survives a server that forgets tokens.
            request["StartAfter"] = found[-1]["Key"]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._client.close()

    def key(self, name: str) -> str:
        """The object's key in the bucket. Raises `BadBlobName`."""
        return self._base + check_name(name)

    def what(self, verb: str, name: str) -> str:
        """For messages."""
        return f"{verb} {name!r} in {self.location.where}"

    async def _run(self, call: Callable[[], T], what: str) -> T:
        return await run_blocking(
            partial(_translated, call, what),
            limiter=self._limiter,
            deadline_s=self.options.call_deadline_s,
            what=what,
        )

    def _create_bucket(self) -> None:
        request: dict[str, Any] = {"Bucket": self.location.bucket}
        if not self.location.endpoint and self.region != DEFAULT_REGION:
            request["CreateBucketConfiguration"] = {"LocationConstraint": self.region}
        try:
            self._client.create_bucket(**request)
        except boto_errors.ClientError as exc:
            if exc.response["Error"].get("Code") != "BucketAlreadyOwnedByYou":
                raise

    def _read(self, key: str, what: str, offset: int, length: int | None) -> bytes:
        """GET in pieces; when the connection breaks, the rest by another range of the same object (by its ETag)."""
        pieces: list[bytes] = []
        have, end, etag = 0, None if length is None else offset + length, ""
        for left in range(_RESUMES_MAX, -1, -1):
            answer = self._get(key, offset + have, end, etag)
            etag = answer["ETag"]
            if end is None:
                end = offset + have + answer["ContentLength"]
            _check_answer(answer, offset + have, end, what)
            try:
                have += _receive(answer["Body"], pieces, end - offset - have)
            except _BROKEN_BODY:
                have = sum(map(len, pieces))
                if not left:
                    raise
            if have == end - offset:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        raise connection_error(what, timed_out=False)

    def _get(self, key: str, start: int, end: int | None, etag: str) -> dict[str, Any]:
        request: dict[str, Any] = {"Bucket": self.location.bucket, "Key": key}
        if start or end is not None:
            request["Range"] = f"bytes={start}-" + ("" if end is None else str(end - 1))
        if etag:
            request["IfMatch"] = etag
        answer: dict[str, Any] = self._client.get_object(**request)
        return answer


async def open_boto3_store(location: S3Location, options: S3Options) -> Boto3Store:
    """Resolve the session and build the store, in a thread; nothing is asked of the server yet.

    Raises `BlobStoreRefused` where the host's AWS configuration is broken or has no credentials.
    """

    def build() -> Boto3Store:
        store = Boto3Store(location, options)
        store.credentials()
        return store

    what = f"open {location.where}"
    return await trio.to_thread.run_sync(partial(_translated, build, what), abandon_on_cancel=True)


def _check_answer(answer: dict[str, Any], start: int, end: int, what: str) -> None:
    """Believe no server that answers another range than was asked for."""
    content_range: str | None = answer.get("ContentRange")
    served = answer["ContentLength"]
    if content_range is None:
        first, total = 0, str(served)
    else:
        span, _, total = content_range.removeprefix("bytes ").partition("/")
        first = int(span.partition("-")[0])
    if first != start:
        answer["Body"].close()
        raise BlobStoreUnavailable(f"{what}: the server ignored the range")
    if served < end - start:
        answer["Body"].close()
        raise RangeUnavailable(f"{what}: it has {total} bytes, not the range [{start}, {end})")


def _receive(body: Any, pieces: list[bytes], wanted: int) -> int:
    """Append what arrives to `pieces`, which keep it even if this raises; returns the count of bytes."""
    have = 0
    try:
        while have < wanted:
            piece = body.read(min(_PIECE_BYTES, wanted - have))
            if not piece:
                break
            pieces.append(piece)
            have += len(piece)
        return have
    finally:
        # An answer read to its end gives its connection back to the pool; of another one the connection is closed.
        body.close()


def _translated(call: Callable[[], T], what: str) -> T:
    try:
        return call()
    except boto_errors.ClientError as exc:
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(exc.response.get("Error", {}).get("Code", ""))
        # For a HEAD, which has no body, botocore makes the status its code.
        raise error_of_status(status, "" if code.isdigit() else code, what) from exc
    except RecursionError:
        # botocore follows a redirect to another region by a request that may be redirected in turn, without end.
        raise BlobStoreRefused(f"{what}: redirected for ever; check the endpoint and the region") from None
    except (boto_errors.BotoCoreError, ResponseParserError) as exc:
        raise _error_without_answer(exc, what) from exc


def _error_without_answer(exc: Exception, what: str) -> BlobStoreError:
    if isinstance(exc, _REFUSED):
        return BlobStoreRefused(f"{what}: {type(exc).__name__}: check this host's AWS configuration and certificates")
    timed_out = isinstance(exc, boto_errors.ReadTimeoutError | boto_errors.ConnectTimeoutError)
    return connection_error(what, timed_out)
