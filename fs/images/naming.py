"""Which bodies have an image, and what it is called.

The key says all that the bytes depend on, so an image is never of something older: blobs are immutable, and numbers of
inodes, versions and blobs are never reused in a volume.
"""

from __future__ import annotations

import re
import struct

from xxhash import xxh3_64_intdigest

from apollofs.metadata.extents import Extents
from apollofs.metadata.records import Body

IMAGE_BYTES_MIN = (1 << 20) + 1
"""Smaller bodies are in the block cache: two files more for each would cost more than they save."""
MAP_SUFFIX = ".map"
NAME = re.compile(r"[0-9a-f]{16}(-[0-9a-f]+-[0-9a-f]{16})?")

_EXTENT = struct.Struct("<5Q")
_SIZE = struct.Struct("<Q")


def is_large(body: Body) -> bool:
    """Whether a body is kept as an image."""
    return body.inode.size_bytes >= IMAGE_BYTES_MIN and not body.inode.is_inline


def body_key(body: Body) -> str:
    """The name of the body's image: of the blob, if the body is exactly that, so that clones share it.

    Else of the inode, its version, and how the body is put together: an open file may have holes that are not yet
    committed, under the version that it had before.
    """
    inode = body.inode
    if len(inode.extents) == 1:
        (extent,) = inode.extents
        if extent.offset == extent.blob_offset == 0 and extent.length == extent.blob_length == inode.size_bytes:
            return f"{extent.blob:016x}"
    return f"{inode.ino:016x}-{inode.body_version:x}-{_layout_sum(inode.extents, inode.size_bytes):016x}"


def record_name(key: str, index: int) -> str:
    """What the checksums of an image's block are sealed under."""
    return f"{key}/{index:08x}"


def _layout_sum(extents: Extents, size_bytes: int) -> int:
    packed = b"".join(
        _EXTENT.pack(one.offset, one.length, one.blob, one.blob_offset, one.blob_length) for one in extents
    )
    return xxh3_64_intdigest(packed + _SIZE.pack(size_bytes))
