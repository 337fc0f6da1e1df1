"""The map beside an image: which blocks are there, with their checksums. Blocking work, but short.

    <key>.map = header, one record a block
    header    = magic 8, block bytes 4, flags 4 (1: every block is there), size 8, inode of the image 8,
                trust: inode 8, size 8, ctime in ns 8, boot id 16; xxh3_64 of the key and all before it 8
    record    = the footer of `blobstore.footer` for the block, in a slot that fits that of a full block

Rules
1. Data first, then its record. A record has a checksum of its own: one that is torn or missing is a block that is not
   there. What a crash has torn of the data does not match the record, and is fetched again.
2. A map is of one image file, whose inode it names: somebody may have deleted the image alone.
3. Trust is for this boot only. After a power failure a file may have its old times and new holes.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from apollofs.blobstore.errors import CorruptBlob
from apollofs.blobstore.footer import TAIL_BYTES, Footer, footer_length, pack_footer, parse_footer
from apollofs.fs.images.naming import record_name
from apollofs.fs.local_io import read_fully, write_fully

MAGIC: Final = b"apolimg1"
COMPLETE: Final = 1
_HEADER: Final = struct.Struct("<8sIIQQQQQ16s")
_SUM: Final = struct.Struct("<Q")
HEADER_BYTES: Final = 128


class BadMap(Exception):
    """No map of this image."""


class Trust(NamedTuple):
    """The image file as it was when all its bytes had been verified."""

    ino: int
    size_bytes: int
    ctime_ns: int


NO_TRUST: Final = Trust(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Header:
    block_bytes: int
    size_bytes: int
    image_ino: int
    complete: bool = False
    trust: Trust = NO_TRUST

    def pack(self, key: str) -> bytes:
        flags = COMPLETE if self.complete else 0
        sizes = (self.block_bytes, flags, self.size_bytes, self.image_ino)
        head = _HEADER.pack(MAGIC, *sizes, *self.trust, boot_id())
        return (head + _SUM.pack(xxh3_64_intdigest(key.encode() + head))).ljust(HEADER_BYTES, b"\0")


def parse_header(key: str, data: bytes) -> Header:
    """Raises BadMap."""
    if len(data) < HEADER_BYTES:
        raise BadMap("it was cut")
    head = data[: _HEADER.size]
    magic, block_bytes, flags, size, image_ino, *trust, boot = _HEADER.unpack(head)
    if magic != MAGIC or _SUM.unpack_from(data, _HEADER.size)[0] != xxh3_64_intdigest(key.encode() + head):
        raise BadMap("its header does not match its checksum")
    trusted = Trust(*trust) if boot == boot_id() else NO_TRUST
    return Header(block_bytes, size, image_ino, bool(flags & COMPLETE), trusted)


class MapFile:
    """An open map. Methods may run in threads, but only one at a time for each block and for the header."""

    def __init__(self, key: str, fd: int, header: Header) -> None:
        """Takes over `fd` and reads all records. Raises OSError; `fd` is then still the caller's."""
        self.header = header
        self.fd = fd
        self.blocks = -(-header.size_bytes // header.block_bytes)
        self._key = key
        self._record_bytes = footer_length(header.block_bytes)
        size = self.blocks * self._record_bytes
        self._records = bytearray(read_fully(fd, HEADER_BYTES, size).ljust(size, b"\0"))
        self._there = bytearray(self._parsed(index) is not None for index in range(self.blocks))
        self._lacking = self._there.count(0)
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        """Whether every block is there."""
        return not self._lacking

    @property
    def bytes_there(self) -> int:
        """Of data, in blocks that are there."""
        last = self._there[-1] * (self.header.block_bytes - self.length(self.blocks - 1))
        return (self.blocks - self._lacking) * self.header.block_bytes - last

    def length(self, index: int) -> int:
        """Bytes of a block."""
        return min(self.header.block_bytes, self.header.size_bytes - index * self.header.block_bytes)

    def has(self, index: int) -> bool:
        return bool(self._there[index])

    def footer(self, index: int) -> Footer | None:
        """The checksums of a block that was there when the map was read, or that was put since."""
        return self._parsed(index) if self._there[index] else None

    def reread(self, index: int) -> bool:
        """Look whether another mount has put the block meanwhile. Raises OSError."""
        if not self._there[index]:
            self._take(index, os.pread(self.fd, self._record_bytes, HEADER_BYTES + index * self._record_bytes))
        return bool(self._there[index])

    def put(self, index: int, footer: Footer) -> None:
        """The block's data is in the image. Raises OSError."""
        record = pack_footer(record_name(self._key, index), footer)
        write_fully(self.fd, HEADER_BYTES + index * self._record_bytes, record)
        self._take(index, record)

    def drop(self, index: int) -> None:
        """The block's data is not what it should be. Raises OSError; here it is dropped all the same."""
        self._take(index, b"")
        write_fully(self.fd, HEADER_BYTES + index * self._record_bytes, bytes(self._record_bytes))

    def set_state(self, *, complete: bool, trust: Trust) -> None:
        """Raises OSError."""
        header = replace(self.header, complete=complete, trust=trust)
        write_fully(self.fd, 0, header.pack(self._key))
        self.header = header

    def close(self) -> None:
        os.close(self.fd)

    def _take(self, index: int, record: bytes) -> None:
        start = index * self._record_bytes
        with self._lock:
            self._records[start : start + self._record_bytes] = record.ljust(self._record_bytes, b"\0")
            there = self._parsed(index) is not None
            self._lacking += self._there[index] - there
            self._there[index] = there

    def _parsed(self, index: int) -> Footer | None:
        start, length = index * self._record_bytes, self.length(index)
        record = self._records[start : start + footer_length(length)]
        if not any(record[-TAIL_BYTES:]):
            return None
        try:
            return parse_footer(record_name(self._key, index), length, record)
        except CorruptBlob:
            return None


@cache
def boot_id() -> bytes:
    """16 bytes that change with each boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))
