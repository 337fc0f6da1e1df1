"""The seal of an object: pure functions over bytes.

    object = data, footer
    footer = one xxh3_64 for each chunk of 256 KiB of data (the last may be shorter), tail
    tail   = magic 8, version 1, log2 of the chunk size 1, zero 6, data length 8, xxh3_64 of the name 8,
             xxh3_64 of all the footer's bytes before it 8

Integers are little-endian. So bit flips, truncation, objects under a wrong name and objects of somebody else are all
noticed, and a part of an object can be verified with the footer alone. It guards against accidents; xxh3 is no
protection from an attacker who may write to the bucket.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from .errors import CorruptBlob
from .port import Buffer

CHUNK_LOG2: Final = 18
CHUNK_BYTES: Final = 1 << CHUNK_LOG2
VERSION: Final = 1
MAGIC: Final = b"apollofs"

_TAIL: Final = struct.Struct("<8sBB6xQQ")
_SUM: Final = struct.Struct("<Q")
TAIL_BYTES: Final = _TAIL.size + _SUM.size


@dataclass(frozen=True, slots=True)
class Footer:
    """The checksums of some data; from an object: they were checked."""

    data_length: int
    chunk_sums: tuple[int, ...]


def chunk_count(data_length: int) -> int:
    """Chunks of `data_length` bytes."""
    return -(-data_length // CHUNK_BYTES)


def footer_length(data_length: int) -> int:
    """Bytes of the footer behind `data_length` bytes."""
    return chunk_count(data_length) * _SUM.size + TAIL_BYTES


def sealed_length(data_length: int) -> int:
    """Bytes of the object that holds `data_length` bytes."""
    return data_length + footer_length(data_length)


def data_length_of(object_length: int) -> int | None:
    """The inverse of `sealed_length`; None if no sealed object has this length."""
    body = object_length - TAIL_BYTES
    if body < 0:
        return None
    chunks = -(-body // (CHUNK_BYTES + _SUM.size))
    data_length = body - chunks * _SUM.size
    return data_length if data_length >= 0 and chunk_count(data_length) == chunks else None


def make_footer(name: str, data: Buffer) -> bytes:
    """The footer for `data` stored under `name`."""
    return pack_footer(name, footer_of(data))


def footer_of(data: Buffer) -> Footer:
    """The checksums of `data`."""
    view = memoryview(data).cast("B")
    sums = [xxh3_64_intdigest(view[start : start + CHUNK_BYTES]) for start in range(0, len(view), CHUNK_BYTES)]
    return Footer(len(view), tuple(sums))


def pack_footer(name: str, footer: Footer) -> bytes:
    """Checksums that are known as the footer of what is stored under `name`."""
    tail = _TAIL.pack(MAGIC, VERSION, CHUNK_LOG2, footer.data_length, _name_sum(name))
    head = struct.pack(f"<{len(footer.chunk_sums)}Q", *footer.chunk_sums) + tail
    return head + _SUM.pack(xxh3_64_intdigest(head))


def parse_footer(name: str, data_length: int, footer: Buffer) -> Footer:
    """Check the footer of the object `name` that should hold `data_length` bytes. Raises `CorruptBlob`."""
    view = memoryview(footer).cast("B")
    if len(view) != footer_length(data_length):
        raise CorruptBlob(f"{name!r}: the footer has {len(view)} bytes, not {footer_length(data_length)}")
    magic, version, chunk_log2, length, name_sum = _TAIL.unpack_from(view, len(view) - TAIL_BYTES)
    if magic != MAGIC:
        raise CorruptBlob(f"{name!r}: no footer at its end; it was cut, or another program wrote it")
    (sum_found,) = _SUM.unpack_from(view, len(view) - _SUM.size)
    if xxh3_64_intdigest(view[: -_SUM.size]) != sum_found:
        raise CorruptBlob(f"{name!r}: the footer's checksum does not match")
    if (version, chunk_log2) != (VERSION, CHUNK_LOG2):
        raise CorruptBlob(f"{name!r}: sealed in the unknown format {version}, chunks of 2**{chunk_log2} bytes")
    if length != data_length:
        raise CorruptBlob(f"{name!r}: holds {length} bytes, not {data_length}")
    if name_sum != _name_sum(name):
        raise CorruptBlob(f"{name!r}: holds what was stored under another name")
    return Footer(length, struct.unpack_from(f"<{chunk_count(length)}Q", view))


def check_chunks(name: str, footer: Footer, first_chunk: int, data: Buffer) -> None:
    """Check `data`, which starts at chunk `first_chunk` and ends at a chunk's or the data's end.

    Raises `CorruptBlob` with the number of the first bad chunk.
    """
    view = memoryview(data).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        chunk = first_chunk + start // CHUNK_BYTES
        if xxh3_64_intdigest(view[start : start + CHUNK_BYTES]) != footer.chunk_sums[chunk]:
            raise CorruptBlob(f"{name!r}: chunk {chunk} (of {CHUNK_BYTES} bytes) does not match its checksum")


def _name_sum(name: str) -> int:
    return xxh3_64_intdigest(name.encode("ascii"))
