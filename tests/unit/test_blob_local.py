"""A directory as a blob store: what is special about it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from apollofs.blobstore import BlobStoreFull, BlobStoreRefused, BlobStoreUnavailable
from apollofs.blobstore.local import LEFTOVER_AGE_S, LocalStore


async def made(directory: Path) -> LocalStore:
    store = LocalStore(str(directory))
    await store.prepare(create=True)
    return store


async def test_a_directory_that_was_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(BlobStoreRefused, match="holds no blob store"):
        await LocalStore(str(tmp_path / "none")).prepare(create=False)
    with pytest.raises(BlobStoreRefused, match="holds no blob store"):
        await LocalStore(str(tmp_path)).prepare(create=False)


async def test_a_directory_that_vanished_is_not_an_empty_one(tmp_path: Path) -> None:
    store = await made(tmp_path / "blobs")
    await store.put("a", b"x")
    (tmp_path / "blobs").rename(tmp_path / "elsewhere")
    for call in (store.read, store.stat, store.delete):
        with pytest.raises(BlobStoreUnavailable):
            await call("a")
    with pytest.raises(BlobStoreUnavailable):
        await store.put("b", b"x")
    with pytest.raises(BlobStoreUnavailable):
        assert [found async for found in store.list()] == []


async def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    store = await made(tmp_path)
    incoming = tmp_path / "incoming"
    for name in ("dead", "living", "young"):
        (incoming / name).write_bytes(b"x")
    for name in ("dead", "living"):
        os.utime(incoming / name, (1e9, 1e9))
    assert LEFTOVER_AGE_S > 0
    with (incoming / "living").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        await store.prepare(create=False)
    assert sorted(each.name for each in incoming.iterdir()) == ["living", "young"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync"])
async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    store = await made(tmp_path)

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(BlobStoreFull):
            await store.put("a/b", b"x")
    assert list((tmp_path / "incoming").iterdir()) == []
    assert [found async for found in store.list()] == []


async def test_a_disk_that_takes_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await made(tmp_path)
    write, pread = os.write, os.pread
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:7]) if len(data) > 8 else write(fd, data))
        patch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 5), offset))
        await store.put("a", b"0123456789" * 5)
        assert await store.read("a") == b"0123456789" * 5
        assert await store.read("a", 3, 20) == (b"0123456789" * 5)[3:23]
