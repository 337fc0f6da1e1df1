"""Answers of the control socket about the cache: `cache`, `warm`, `drop`, `pin`, `unpin`.

    {"ask": "warm", "inos": [..], "offset": 0, "length": N}   ->   {"failed": {"<ino>": "one line", ...}}

`offset` and `length` are for one large file, of which a request brings a part. What fails fails for itself. `drop` and
`unpin` without `inos` are for all that is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from apollofs.fs.cache_orders import CacheOrders
from apollofs.fs.control import Handler
from apollofs.fs.errors import BodyError
from apollofs.fs.user_error import UserError
from apollofs.fs.workers import share_out
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.records import FILE_BYTES_MAX, Body
from apollofs.metadata.volume import Volume

FILES_AT_ONCE = 8


def cache_handlers(volume: Volume, orders: CacheOrders) -> Mapping[str, Handler]:
    """By what is asked."""

    async def cache(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return orders.status()

    async def warm(request: Mapping[str, Any]) -> Mapping[str, Any]:
        offset, length = int(request.get("offset", 0)), int(request.get("length", FILE_BYTES_MAX))
        if offset < 0 or length < 0:
            raise UserError("the request does not say which bytes are meant")
        return await _for_each(request, lambda ino: _warm(volume, orders, ino, offset, length))

    async def drop(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if "inos" not in request:
            await orders.drop_all()
            return {"failed": {}}
        return await _for_each(request, lambda ino: _drop(volume, orders, ino))

    async def pin(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return await _for_each(request, lambda ino: _pin(volume, orders, ino))

    async def unpin(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if "inos" not in request:
            return {"failed": {}, "files": await orders.unpin_all()}
        return await _for_each(request, lambda ino: _unpin(orders, ino))

    return {"cache": cache, "warm": warm, "drop": drop, "pin": pin, "unpin": unpin}


async def _warm(volume: Volume, orders: CacheOrders, ino: int, offset: int, length: int) -> None:
    body = await volume.read_body(ino)
    await orders.warm(body, offset, min(length, max(0, body.inode.size_bytes - offset)))


async def _drop(volume: Volume, orders: CacheOrders, ino: int) -> None:
    if not await orders.drop(await volume.read_body(ino)):
        raise UserError("it is open, or pinned")


async def _pin(volume: Volume, orders: CacheOrders, ino: int) -> None:
    body: Body = await volume.read_body(ino)
    await orders.pin(body)


async def _unpin(orders: CacheOrders, ino: int) -> None:
    if not await orders.unpin(ino):
        raise UserError("it is not pinned")


async def _for_each(request: Mapping[str, Any], call: Callable[[int], Awaitable[None]]) -> Mapping[str, Any]:
    inos = request.get("inos")
    if not isinstance(inos, list) or not all(isinstance(ino, int) for ino in inos):
        raise UserError("the request does not say which files are meant")
    failed: dict[str, str] = {}

    async def one(ino: int) -> None:
        try:
            await call(ino)
        except (UserError, BodyError, MetadataError) as exc:
            failed[str(ino)] = str(exc)

    await share_out(one, inos, min(FILES_AT_ONCE, max(1, len(inos))))
    return {"failed": failed}
