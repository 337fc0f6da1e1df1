"""Blobs in an S3 bucket by obstore, the Rust client: the hot path. The only module that imports obstore.

What obstore has no fit for stays with the boto3 store that it is built on: credentials, the bucket, and listing
(obstore lists whole path components only, and promises no order). Whole objects are received past it (`s3_receive.py`).

Its calls release the GIL and run in threads. Its own retries are off: `retry.py` alone repeats.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import obstore
import trio
from obstore.store import S3Store

from .errors import BlobStoreError, BlobStoreRefused, BlobStoreUnavailable, NoSuchBlob, RangeUnavailable
from .names import check_range
from .port import BlobStat, BlobStore, Buffer
from .rooms import Rooms
from .s3 import Boto3Store
from .s3_errors import connection_error, error_of_status
from .s3_receive import Receiver
from .threads import run_blocking

T = TypeVar("T")

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,60})</Code>")
_CREDENTIALS_TTL: Final = timedelta(minutes=10)
"""obstore asks again five minutes before the end; botocore renews ten to fifteen minutes before its own."""
_URL_TTL: Final = timedelta(hours=1)
"""Clocks may differ by as much."""


class ObstoreStore(BlobStore):
    """See `port.BlobStore`. `control` is closed with it."""

    def __init__(self, control: Boto3Store) -> None:
        self._control = control
        self._deadline_s = control.options.call_deadline_s
        self._limiter = trio.CapacityLimiter(control.options.threads)
        self._store = _build(control)
        self._rooms = Rooms()
        self._receiver = Receiver(lambda key: obstore.sign(self._store, "GET", key, _URL_TTL), control.options)

    async def put(self, name: str, data: Buffer) -> None:
        call = partial(obstore.put, self._store, self._control.key(name), data, use_multipart=False)
        # A thread left behind must not send a buffer that the caller already fills anew.
        await self._run(call, self._control.what("write", name), abandon=memoryview(data).readonly)

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length)
        key, what = self._control.key(name), self._control.what("read", name)
        if length == 0:
            return await self._control.read_nothing(name, offset)
        try:
            return await self._run(partial(self._read, key, what, offset, length), what)
        except RangeUnavailable:
            if length is None:
                return await self._control.read_nothing(name, offset)
            raise

    async def read_into(self, name: str, length: int, then: Callable[[Buffer], T]) -> T:
        key, what = self._control.key(name), self._control.what("read", name)
        reception = self._receiver.begin()

        def receive() -> T:
            room = self._rooms.take(length)
            reception.receive(key, what, room)
            return then(room)

        try:
            return await self._run(receive, what)
        except BaseException:
            reception.abort()
            raise

    async def stat(self, name: str) -> BlobStat:
        what = self._control.what("stat", name)
        try:
            meta = await self._run(partial(obstore.head, self._store, self._control.key(name)), what)
        except NoSuchBlob:
            await self._control.explain_missing(what)
            raise
        return BlobStat(name, meta["size"], meta["last_modified"].timestamp())

    async def delete(self, name: str) -> None:
        try:
            await self._run(
                partial(obstore.delete, self._store, self._control.key(name)), self._control.what("delete", name)
            )
        except NoSuchBlob:
            return

    def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        return self._control.list(prefix, start_after)

    async def aclose(self) -> None:
        self._receiver.close()
        await self._control.aclose()

    async def _run(self, call: Callable[[], T], what: str, abandon: bool = True) -> T:
        return await run_blocking(
            partial(_translated, call, what),
            limiter=self._limiter,
            deadline_s=self._deadline_s,
            what=what,
            abandon=abandon,
        )

    def _read(self, key: str, what: str, offset: int, length: int | None) -> bytes:
        return bytes(self._get(key, what, offset, length))

    def _get(self, key: str, what: str, offset: int, length: int | None) -> memoryview:
        options: dict[str, Any] = {}
        if length is not None:
            options["range"] = (offset, offset + length)
        elif offset:
            options["range"] = {"offset": offset}
        answer = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
        start, end = answer.range
        total = answer.meta["size"]
        if start != offset:
            raise BlobStoreUnavailable(f"{what}: the server ignored the range")
        if length is not None and total < offset + length:
            raise RangeUnavailable(f"{what}: it has {total} bytes, not the range [{offset}, {offset + length})")
        data = memoryview(answer.bytes())
        if len(data) != end - start or (length is not None and len(data) != length):
            raise connection_error(what, timed_out=False)
        return data


def _build(control: Boto3Store) -> S3Store:
    """Everything is said outright, because obstore would take what isn't from the environment."""
    location, options = control.location, control.options
    endpoint = control.endpoint
    virtual = location.addressing == "virtual"
    if virtual:
        parts = urlsplit(endpoint)
        endpoint = f"{parts.scheme}://{location.bucket}.{parts.netloc}"
    client_options: dict[str, Any] = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.read_timeout_s),
        "timeout": timedelta(seconds=options.call_deadline_s),
    }
    if options.ca_file is not None:
        with open(options.ca_file, "rb") as pem:
            client_options["root_certificate"] = pem.read()
    return S3Store(
        location.bucket,
        endpoint=endpoint,
        aws_endpoint_url_s3=endpoint,
        region=control.region,
        virtual_hosted_style_request=virtual,
        skip_signature=False,
        unsigned_payload=True,
        disable_bulk_delete=True,
        s3_express=False,
        client_options=client_options,  # type: ignore[arg-type]
        retry_config={"max_retries": 0},
        credential_provider=partial(_credentials, control),
    )


def _credentials(control: Boto3Store) -> Any:
    """What obstore calls, in a thread of its own, when it has no keys or they may have been replaced."""
    found = control.credentials()
    return {
        "access_key_id": found.access_key,
        "secret_access_key": found.secret_key,
        "token": found.token,
        "expires_at": datetime.now(UTC) + _CREDENTIALS_TTL if found.expires else None,
    }


def _translated(call: Callable[[], T], what: str) -> T:
    try:
        return call()
    except (obstore.exceptions.BaseError, OSError) as exc:
        error = _error_of_text(str(exc), what)
        # The text of a refusal may quote the request that was signed; a traceback in a log must not.
        raise error from (None if isinstance(error, BlobStoreRefused) else exc)


def _error_of_text(text: str, what: str) -> BlobStoreError:
    """obstore's exceptions carry their facts only in their text."""
    status = _STATUS.search(text)
    if status is not None:
        code = _CODE.search(text)
        return error_of_status(int(status[1]), code[1] if code else "", what)
    if "Received redirect" in text:
        return BlobStoreRefused(f"{what}: redirected; check the endpoint and the region")
    if "invalid peer certificate" in text:
        return BlobStoreRefused(f"{what}: the server's certificate isn't trusted; name its authority")
    return connection_error(what, timed_out="kind: Timeout" in text or "TimedOut" in text)
