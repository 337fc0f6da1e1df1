"""The table from opcodes to `WireOperations` methods: which decoder before the call, which encoder after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from apollofs.fs.attributes import Attributes
from apollofs.fs.wire_constants import Opcode, OpenReplyFlag
from apollofs.fs.wire_operations import WireOperations
from apollofs.fs.wire_replies import (
    DirectoryReply,
    encode_copied,
    encode_create,
    encode_ioctl,
    encode_lock,
    encode_lseek,
    encode_opened,
    encode_statx,
)
from apollofs.fs.wire_structs import (
    ReadDirectoryRequest,
    Request,
    decode_copy_range,
    decode_create,
    decode_fallocate,
    decode_ioctl,
    decode_lock,
    decode_lseek,
    decode_read,
    decode_release,
    decode_setxattr,
    decode_statx,
)

Encode: TypeAlias = Callable[[Any], bytes]
Route: TypeAlias = Callable[[Request, bytes], tuple[Any, Encode]]
"""From a request to what the handler returned (a coroutine if it is async), and how to encode its result."""

COPIED_MAX = (1 << 32) - 1


def routes(operations: WireOperations, extended_xattr: Callable[[], bool]) -> dict[int, Route]:
    """The routes of the methods that `operations` overrides.

    `extended_xattr` says whether SETXATTR_EXT was negotiated, which is known only after INIT.
    """
    return {
        opcode: route
        for method, opcode, route in _all_routes(operations, extended_xattr)
        if getattr(type(operations), method) is not getattr(WireOperations, method)
    }


def _all_routes(operations: WireOperations, extended_xattr: Callable[[], bool]) -> Iterator[tuple[str, Opcode, Route]]:
    ops = operations
    yield "getlk", Opcode.GETLK, lambda r, body: (ops.getlk(r, decode_lock(body)), encode_lock)
    yield "setlk", Opcode.SETLK, lambda r, body: (ops.setlk(r, decode_lock(body), wait=False), _nothing)
    yield "setlk", Opcode.SETLKW, lambda r, body: (ops.setlk(r, decode_lock(body), wait=True), _nothing)
    yield "fallocate", Opcode.FALLOCATE, lambda r, body: (ops.fallocate(r, decode_fallocate(body)), _nothing)
    yield "lseek", Opcode.LSEEK, lambda r, body: (ops.lseek(r, decode_lseek(body)), encode_lseek)
    yield "copy_file_range", Opcode.COPY_FILE_RANGE, _copy_route(ops, wide=False)
    yield "copy_file_range", Opcode.COPY_FILE_RANGE_64, _copy_route(ops, wide=True)
    yield "ioctl", Opcode.IOCTL, _ioctl_route(ops)
    yield "statx", Opcode.STATX, lambda r, body: (ops.statx(r, decode_statx(body)), encode_statx)
    yield "open_directory", Opcode.OPENDIR, lambda r, body: (ops.open_directory(r), _opened)
    yield (
        "release_directory",
        Opcode.RELEASEDIR,
        lambda r, body: (ops.release_directory(r, decode_release(body)), _nothing),
    )
    yield "read_directory", Opcode.READDIR, _directory_route(ops, plus=False)
    yield "read_directory", Opcode.READDIRPLUS, _directory_route(ops, plus=True)
    yield "tmpfile", Opcode.TMPFILE, lambda r, body: (ops.tmpfile(r, decode_create(body)), _created)
    yield (
        "set_xattr",
        Opcode.SETXATTR,
        lambda r, body: (ops.set_xattr(r, decode_setxattr(body, extended=extended_xattr())), _nothing),
    )


def _nothing(result: None) -> bytes:
    """The encoder of a reply that is a header only."""
    return b""


def _opened(result: tuple[int, OpenReplyFlag]) -> bytes:
    return encode_opened(*result)


def _created(result: tuple[Attributes, int]) -> bytes:
    attributes, fh = result
    return encode_create(attributes, fh)


def _copy_route(operations: WireOperations, *, wide: bool) -> Route:
    def route(request: Request, body: bytes) -> tuple[Any, Encode]:
        copy = decode_copy_range(body)
        copy = copy._replace(length=min(copy.length, COPIED_MAX))
        return operations.copy_file_range(request, copy), lambda copied: encode_copied(copied, wide=wide)

    return route


def _ioctl_route(operations: WireOperations) -> Route:
    def route(request: Request, body: bytes) -> tuple[Any, Encode]:
        ioctl = decode_ioctl(body)

        def encode(data: bytes) -> bytes:
            if len(data) > ioctl.out_size_max:
                raise ValueError(f"ioctl {ioctl.command:#x} handed out {len(data)} bytes of {ioctl.out_size_max}")
            return encode_ioctl(data)

        return operations.ioctl(request, ioctl), encode

    return route


def _directory_route(operations: WireOperations, *, plus: bool) -> Route:
    def route(request: Request, body: bytes) -> tuple[Any, Encode]:
        details = decode_read(body)
        read = ReadDirectoryRequest(details.fh, details.offset, details.size, plus)
        reply = DirectoryReply(read)
        return operations.read_directory(request, read, reply), lambda _: reply.to_bytes()

    return route
