"""The trash: what can be restored, as what, and what stands in the way."""

from __future__ import annotations

import os

import pytest

from apollofs.fs.trash import Trash
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import EntryExists, NoSuchEntry
from apollofs.metadata.records import ROOT_INO
from tests.support.collecting import collect, keys_in, objects
from tests.support.filesystems import LARGE, USER, Pair, close, content, create, save
from tests.support.volumes import VOLUME


def trash(pair: Pair) -> Trash:
    return Trash(pair.store, VOLUME)


async def unlink(pair: Pair, name: bytes) -> None:
    await pair.here.unlink(ROOT_INO, name)
    await pair.volume.settle()


async def test_a_restored_file_is_as_it_was(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await pair.here.setxattr(ino, b"user.a", b"value", 0)
    # held elsewhere, so that the restored name must be told there
    await pair.there.lookup(ROOT_INO, b"f")
    await unlink(pair, b"f")
    with pytest.raises(NoSuchEntry):
        await pair.there.lookup(ROOT_INO, b"f")
    (found,) = await trash(pair).list(0, 10)
    assert (found.path, found.has_place, found.inode.size_bytes) == (b"/f", True, len(LARGE))
    assert await trash(pair).restore(ino, b"", "0") == b"/f"
    assert await content(pair.there) == LARGE
    assert await pair.there.getxattr(ino, b"user.a") == b"value"
    assert (await pair.here.lookup(ROOT_INO, b"f")).nlink == 1
    assert await trash(pair).list(0, 10) == []
    assert (await collect(pair.store, pair.blobs)).tombstones == 0
    await unlink(pair, b"f")
    assert (await collect(pair.store, pair.blobs)).tombstones == 1
    assert await objects(pair.blobs) == []


async def test_fragmented_and_inline_files_and_symlinks_come_back(pair: Pair) -> None:
    attributes, fh = await create(pair.here, b"many")
    for number in range(40):
        await pair.here.write(fh, number * 1000, b"x" * 100)
        await pair.here.fsync(fh, data_only=False)
    await close(pair.here, fh)
    before = await content(pair.here, b"many")
    small = await save(pair.here, b"small", b"inline")
    link = (await pair.here.symlink(ROOT_INO, b"link", b"target", USER)).ino
    for name in (b"many", b"small", b"link"):
        await unlink(pair, name)
    assert len(await trash(pair).list(0, 2)) == 2
    for ino in (attributes.ino, small, link):
        await trash(pair).restore(ino, b"", "0")
    assert await content(pair.there, b"many") == before
    assert await content(pair.there, b"small") == b"inline"
    assert await pair.there.readlink((await pair.there.lookup(ROOT_INO, b"link")).ino) == b"target"


async def test_to_another_place(pair: Pair) -> None:
    directory = (await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)).ino
    _, opened = await pair.here.create(directory, b"f", 0o644, os.O_WRONLY | os.O_CREAT, USER)
    await pair.here.write(opened.fh, 0, LARGE)
    await close(pair.here, opened.fh)
    ino = (await pair.here.lookup(directory, b"f")).ino
    await pair.here.unlink(directory, b"f")
    await pair.here.rmdir(ROOT_INO, b"d")
    await pair.volume.settle()
    (found,) = await trash(pair).list(0, 10)
    assert (found.path, found.has_place) == (b"f", False)
    with pytest.raises(UserError, match="--to"):
        await trash(pair).restore(ino, b"", "0")
    with pytest.raises(NoSuchEntry):
        await trash(pair).restore(ino, b"/d/f", "0")
    assert await trash(pair).restore(ino, b"/g", "0") == b"/g"
    assert await content(pair.there, b"g") == LARGE


async def test_what_stands_in_the_way(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    opened = await pair.there.open((await pair.there.lookup(ROOT_INO, b"f")).ino, os.O_RDONLY, USER)
    await unlink(pair, b"f")
    with pytest.raises(BaseExceptionGroup) as caught:
        await trash(pair).restore(ino, b"", "0")
    assert caught.group_contains(UserError, match="open", depth=None)
    await close(pair.there, opened.fh)
    await save(pair.here, b"f", b"another")
    with pytest.raises(BaseExceptionGroup) as caught:
        await trash(pair).restore(ino, b"", "0")
    assert caught.group_contains(EntryExists, depth=None)
    await collect(pair.store, pair.blobs)
    with pytest.raises(UserError, match="not in the trash"):
        await trash(pair).restore(ino, b"/g", "0")
    assert await keys_in(pair.store, "g") == []


async def test_what_the_collector_has_begun_with_is_gone(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await unlink(pair, b"f")
    (found,) = await trash(pair).list(0, 10)

    async def stopped(name: str) -> None:
        raise RuntimeError("the collector ends here")

    pair.blobs.delete, delete = stopped, pair.blobs.delete  # type: ignore[method-assign]
    with pytest.raises(BaseExceptionGroup):
        await collect(pair.store, pair.blobs)
    pair.blobs.delete = delete  # type: ignore[method-assign]
    assert await trash(pair).list(0, 10) == []
    with pytest.raises(UserError, match="not in the trash"):
        await trash(pair).restore(ino, b"", "0")
    with pytest.raises(NoSuchEntry):
        await pair.volume.restore(found.stone.key, ROOT_INO, b"f")
