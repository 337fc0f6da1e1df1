"""Small files that share one object, made at will."""

from __future__ import annotations

from apollofs.fs.blobs import Block
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, Owner
from tests.support.filesystems import Pair

MEMBER = 500


def body(number: int, size: int = MEMBER) -> bytes:
    """The bytes of file `number`."""
    return (b"%04d " % number * size)[:size]


async def pack(pair: Pair, count: int, first: int = 0) -> list[int]:
    """Files of MEMBER bytes called `first`, `first` + 1, ... in the root, that share a blob; their inodes."""
    block = Block(pair.volume.new_blob(), 0, count * MEMBER)
    await pair.blobs.put(block.name, b"".join(body(first + index) for index in range(count)))
    inos = []
    for index in range(count):
        made = await pair.volume.mknod(ROOT_INO, b"%d" % (first + index), 0o100644, 0, Owner(0, 0))
        extent = Extent(0, MEMBER, block.blob, index * MEMBER, block.length)
        await pair.volume.commit_body(made.ino, BodyChange(made.body_version, MEMBER, (extent,), is_packed=True))
        inos.append(made.ino)
    return inos
