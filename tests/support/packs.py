"""Small files that share one object, made at will."""

from __future__ import annotations

from collections.abc import Mapping

from apollofs.fs.blobs import Block
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, Owner
from tests.support.filesystems import Pair

MEMBER = 500


def body(number: int, size: int = MEMBER) -> bytes:
    """The bytes of file `number`."""
    return (b"%04d " % number * size)[:size]


async def pack(pair: Pair, count: int, first: int = 0) -> list[int]:
    """Files of MEMBER bytes called `first`, `first` + 1, ... in the root, that share a blob; their inodes."""
    return await pack_bodies(pair, {b"%d" % number: body(number) for number in range(first, first + count)})


async def pack_bodies(pair: Pair, bodies: Mapping[bytes, bytes]) -> list[int]:
    """New files in the root with these names and bodies, that share a blob; their inodes."""
    data = b"".join(bodies.values())
    block = Block(pair.volume.new_blob(), 0, len(data))
    await pair.blobs.put(block.name, data)
    inos, at = [], 0
    for name, each in bodies.items():
        made = await pair.volume.mknod(ROOT_INO, name, 0o100644, 0, Owner(0, 0))
        extent = Extent(0, len(each), block.blob, at, block.length)
        await pair.volume.commit_body(made.ino, BodyChange(made.body_version, len(each), (extent,), is_packed=True))
        inos.append(made.ino)
        at += len(each)
    return inos
