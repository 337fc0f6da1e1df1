"""Requests and replies of the FUSE wire, against layouts written out by hand."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.fs.attributes import Attributes
from apollofs.fs.wire_constants import SetattrValid
from apollofs.fs.wire_replies import (
    DirectoryReply,
    LockRange,
    encode_attr,
    encode_attr_out,
    encode_copied,
    encode_create,
    encode_delete,
    encode_entry,
    encode_fs_flags,
    encode_fsxattr,
    encode_inval_entry,
    encode_inval_inode,
    encode_ioctl,
    encode_lock,
    encode_lseek,
    encode_statx,
    encode_store,
    split_timeout,
)
from apollofs.fs.wire_structs import (
    ReadDirectoryRequest,
    decode_copy_range,
    decode_create,
    decode_fallocate,
    decode_flush,
    decode_fs_flags,
    decode_fsxattr,
    decode_ioctl,
    decode_lock,
    decode_lseek,
    decode_open,
    decode_read,
    decode_release,
    decode_setattr,
    decode_setxattr,
    decode_statx,
    decode_write,
)


def attributes(**changes: float) -> Attributes:
    values: dict[str, float] = {
        "ino": 7,
        "mode": 0o100644,
        "nlink": 2,
        "uid": 1000,
        "gid": 100,
        "rdev": 0,
        "size_bytes": 5 << 32,
        "blocks": 3,
        "atime_ns": 1,
        "mtime_ns": 2_000_000_003,
        "ctime_ns": -1,
        "btime_ns": 4_000_000_005,
    }
    return Attributes(**{**values, **changes})  # type: ignore[arg-type]


def test_lock_request() -> None:
    body = struct.pack("<QQQQIIII", 3, 1 << 63, 10, (1 << 63) - 1, 1, 4242, 1, 0)
    lock = decode_lock(body)
    assert lock == (3, 1 << 63, 10, (1 << 63) - 1, 1, 4242, True)
    assert decode_lock(body[:40] + bytes(8)).flock is False
    assert encode_lock(LockRange(1, 2, 0, 9)) == struct.pack("<QQII", 1, 2, 0, 9)


def test_write_and_read() -> None:
    body = struct.pack("<QQIIQII", 5, 1 << 40, 4096, 4, 77, os.O_APPEND | os.O_SYNC, 0) + b"data"
    write = decode_write(body)
    assert write == (5, 1 << 40, 4096, 4, 77, os.O_APPEND | os.O_SYNC)
    assert decode_read(body)[:3] == (5, 1 << 40, 4096)


def test_open_create_flush_release() -> None:
    assert decode_open(struct.pack("<II", os.O_RDWR, 1)) == (os.O_RDWR, 1)
    assert decode_create(struct.pack("<IIII", 1, 0o644, 0o22, 0) + b"name\0") == (1, 0o644, 0o22, 0)
    assert decode_flush(struct.pack("<QIIQ", 9, 0, 0, 55)) == (9, 55)
    assert decode_release(struct.pack("<QIIQ", 9, 2, 3, 55)) == (9, 2, 3, 55)


def test_setattr_with_times_before_1970() -> None:
    body = struct.pack(
        "<IIQQQqqqIIIIIIII", SetattrValid.MTIME, 0, 8, 9, 10, -1, -2, 3, 5, 999_999_999, 7, 0o644, 0, 11, 12, 0
    )
    assert len(body) == 88
    details = decode_setattr(body)
    assert (details.valid, details.fh, details.size, details.lock_owner) == (SetattrValid.MTIME, 8, 9, 10)
    assert (details.atime_ns, details.mtime_ns, details.ctime_ns) == (-999_999_995, -1_000_000_001, 3_000_000_007)
    assert (details.mode, details.uid, details.gid) == (0o644, 11, 12)


def test_ranges() -> None:
    assert decode_fallocate(struct.pack("<QQQII", 1, 2, 3, 4, 0)) == (1, 2, 3, 4)
    assert decode_lseek(struct.pack("<QqII", 1, 2, 3, 0)) == (1, 2, 3)
    assert encode_lseek(1 << 40) == struct.pack("<Q", 1 << 40)
    assert decode_copy_range(struct.pack("<7Q", *range(1, 8))) == tuple(range(1, 8))
    assert encode_copied(9, wide=False) == struct.pack("<II", 9, 0)
    assert encode_copied(1 << 33, wide=True) == struct.pack("<Q", 1 << 33)


def test_ioctl() -> None:
    body = struct.pack("<QIIQII", 1, 2, 3, 4, 5, 6) + b"hello and more"
    assert decode_ioctl(body) == (1, 2, 3, 4, b"hello", 6)
    assert encode_ioctl(b"xy", 3) == struct.pack("<iIII", 3, 0, 0, 0) + b"xy"
    assert decode_fs_flags(encode_fs_flags(0x30, 8)) == 0x30
    assert len(encode_fs_flags(0x30, 4)) == 4
    assert len(encode_fs_flags(0x30, 8)) == 8


def test_fsxattr_has_its_own_bits() -> None:
    raw = encode_fsxattr(0x10 | 0x20)
    assert raw == struct.pack("<I", 0x08 | 0x10) + bytes(24)
    assert decode_fsxattr(raw) == 0x30


def test_setxattr() -> None:
    body = struct.pack("<II", 5, 1) + b"user.a\0v\0lue"
    assert decode_setxattr(body, extended=False) == (b"user.a", b"v\0lue", 1, False)
    body = struct.pack("<IIII", 0, 2, 1, 0) + b"user.b\0"
    assert decode_setxattr(body, extended=True) == (b"user.b", b"", 2, True)


@pytest.mark.parametrize("decode", [decode_lock, decode_write, decode_setattr, decode_ioctl, decode_statx, decode_open])
def test_a_short_body_is_an_error(decode: object) -> None:
    assert callable(decode)
    with pytest.raises(struct.error):
        decode(b"short")


def test_attr_has_the_kernels_layout() -> None:
    raw = encode_attr(attributes(rdev=os.makedev(300, 70000)))
    assert len(raw) == 88
    fields = struct.unpack("<QQQqqqIIIIIIIIII", raw)
    assert fields[:6] == (7, 5 << 32, 3, 0, 2, -1)
    assert fields[6:9] == (1, 3, 999_999_999)
    assert fields[9:13] == (0o100644, 2, 1000, 100)
    assert (os.major(fields[13]), os.minor(fields[13])) == (300, 70000)


def test_entry_attr_out_and_create() -> None:
    a = attributes(attr_timeout_s=1.5, entry_timeout_s=2.25)
    entry = encode_entry(a, generation=4)
    assert len(entry) == 128
    assert struct.unpack_from("<QQQQII", entry) == (7, 4, 2, 1, 250_000_000, 500_000_000)
    assert entry[40:] == encode_attr(a)
    assert encode_attr_out(a) == struct.pack("<QII", 1, 500_000_000, 0) + encode_attr(a)
    assert encode_create(a, 33, 2, 5) == encode_entry(a) + struct.pack("<QIi", 33, 2, 5)


def test_statx_has_the_kernels_layout() -> None:
    raw = encode_statx(attributes(flags=0x10, rdev=os.makedev(8, 1)))
    assert len(raw) == 32 + 256
    stat = raw[32:]
    mask, blksize, attribute_bits = struct.unpack_from("<IIQ", stat)
    assert (mask & 0x800, blksize, attribute_bits) == (0x800, 4096, 0x10)
    assert struct.unpack_from("<IIIH2xQQQQ", stat, 16) == (2, 1000, 100, 0o100644, 7, 5 << 32, 3, 0x30)
    times = [struct.unpack_from("<qI", stat, 64 + 16 * i) for i in range(4)]
    assert times == [(0, 1), (4, 5), (-1, 999_999_999), (2, 3)]  # atime, btime, ctime, mtime
    assert struct.unpack_from("<IIII", stat, 128) == (8, 1, 0, 0)


@given(st.floats(allow_nan=False))
def test_timeouts_are_always_representable(timeout_s: float) -> None:
    seconds, nanoseconds = split_timeout(timeout_s)
    assert 0 <= seconds < 1 << 32
    assert 0 <= nanoseconds < 1_000_000_000


def parse_entries(data: bytes, *, plus: bool) -> list[tuple[int, int, int, bytes, int]]:
    """(nodeid, ino, next offset, name, type) of each entry, as the kernel would walk them."""
    found = []
    at = 0
    while at < len(data):
        nodeid = 0
        if plus:
            nodeid = struct.unpack_from("<Q", data, at)[0]
            at += 128
        ino, offset, length, kind = struct.unpack_from("<QQII", data, at)
        found.append((nodeid, ino, offset, data[at + 24 : at + 24 + length], kind))
        at += 24 + (length + 7) // 8 * 8
    assert at == len(data)
    return found


@given(
    st.lists(st.binary(min_size=1, max_size=255), max_size=30), st.integers(min_value=0, max_value=5000), st.booleans()
)
def test_directory_reply_keeps_to_its_size(names: list[bytes], size_max: int, plus: bool) -> None:
    reply = DirectoryReply(ReadDirectoryRequest(1, 0, size_max, plus))
    added = []
    for number, name in enumerate(names):
        if not reply.add(name, attributes(ino=number + 2), (1 << 62) + number):
            break
        added.append((number + 2 if plus else 0, number + 2, (1 << 62) + number, name, 8))
    data = reply.to_bytes()
    assert len(data) <= size_max
    assert parse_entries(data, plus=plus) == added


def test_a_name_without_attributes_is_not_looked_up() -> None:
    reply = DirectoryReply(ReadDirectoryRequest(1, 0, 4096, plus=True))
    assert reply.add_name(b"..", 1, 0o040755, 2)
    assert parse_entries(reply.to_bytes(), plus=True) == [(0, 1, 2, b"..", 4)]


def test_notifications() -> None:
    assert encode_inval_inode(3, -1, 0) == struct.pack("<Qqq", 3, -1, 0)
    assert encode_inval_entry(3, b"ab", 1) == struct.pack("<QII", 3, 2, 1) + b"ab\0"
    assert encode_delete(3, 4, b"ab") == struct.pack("<QQII", 3, 4, 2, 0) + b"ab\0"
    assert encode_store(3, 4, b"abc") == struct.pack("<QQII", 3, 4, 3, 0) + b"abc"


def test_statx_request() -> None:
    assert decode_statx(struct.pack("<IIQII", 1, 0, 9, 0, 0xFFF)) == (9, 0, 0xFFF)
    assert decode_statx(struct.pack("<IIQII", 0, 0, 9, 0, 0xFFF)).fh is None
