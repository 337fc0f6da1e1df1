"""Files that are written past the daemon: when a commit has something to do though the inode knows the copy's times."""

from __future__ import annotations

import os
import random

import pytest

from apollofs.fs.passed_file import PassedFile
from apollofs.metadata.errors import StoreUnavailable
from apollofs.metadata.records import SetAttr
from tests.support.bodies import BLOCK, Mount, mount, world

__all__ = ["mount", "world"]


async def passed(mount: Mount) -> PassedFile:
    """A new file, opened for writing by passthrough."""
    return mount.bodies.pass_through(await mount.bodies.open(await mount.create()))


def kernel_writes(file: PassedFile, offset: int, data: bytes) -> None:
    assert os.pwrite(file.copy.fd, data, offset) == len(data)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def store_ready(file: PassedFile) -> int:
    """Two polls of the uploader; how many blocks it stored."""
    uploads = [*await file.ready_uploads(), *await file.ready_uploads()]
    for upload in uploads:
        await upload()
    return len(uploads)


async def set_mtime(mount: Mount, file: PassedFile, mtime_ns: int) -> None:
    async with file.expecting_mtime(mtime_ns):
        file.adopt(await mount.volume.setattr(file.ino, SetAttr(mtime_ns=mtime_ns)))


@pytest.mark.parametrize("size", [4 * BLOCK, 2 * BLOCK, 6 * BLOCK])
async def test_what_was_stored_ahead_is_committed_though_a_truncation_told_the_times(mount: Mount, size: int) -> None:
    """All blocks are in the store when the file is cut, and nothing is stored after that."""
    file, data = await passed(mount), noise(4, 4 * BLOCK)
    kernel_writes(file, 0, data)
    assert await store_ready(file) == 4
    await file.truncate(SetAttr(size_bytes=size))
    await file.commit()
    assert await mount.content(file.ino) == data[:size].ljust(size, b"\0")


async def test_what_fills_a_preallocated_file_is_committed_though_its_times_were_set(mount: Mount) -> None:
    file, data = await passed(mount), noise(4, 4 * BLOCK)
    await file.truncate(SetAttr(size_bytes=4 * BLOCK))
    await file.commit()
    kernel_writes(file, 0, data)
    assert await store_ready(file) == 4
    await set_mtime(mount, file, 5_000_000_000)
    await file.commit()
    assert await mount.content(file.ino) == data
    commits = len(mount.volume.commits)
    await set_mtime(mount, file, 6_000_000_000)
    await file.commit()
    assert len(mount.volume.commits) == commits, "the bytes are the same"


async def test_what_a_commit_that_failed_has_stored_is_committed_though_the_times_were_set(mount: Mount) -> None:
    file, data = await passed(mount), bytearray(noise(1, 4 * BLOCK))
    kernel_writes(file, 0, bytes(data))
    await file.commit()
    kernel_writes(file, BLOCK, b"new bytes")
    data[BLOCK : BLOCK + 9] = b"new bytes"
    mount.volume.faults = ["refused"]
    with pytest.raises(StoreUnavailable):
        await file.commit()
    await set_mtime(mount, file, 5_000_000_000)
    await file.commit()
    assert await mount.content(file.ino) == bytes(data)
    assert (await mount.volume.read_body(file.ino)).inode.mtime_ns == 5_000_000_000


async def test_a_time_that_the_disk_does_not_know_is_kept(mount: Mount) -> None:
    file, when = await passed(mount), -4_000_000_000 * 10**9
    kernel_writes(file, 0, noise(1, 4 * BLOCK))
    await set_mtime(mount, file, when)
    assert file.inode.mtime_ns == when
    await file.commit()
    assert (await mount.volume.read_body(file.ino)).inode.mtime_ns == file.inode.mtime_ns == when


async def test_a_time_that_was_set_is_kept(mount: Mount) -> None:
    file = await passed(mount)
    kernel_writes(file, 0, b"text")
    await set_mtime(mount, file, 5_000_000_000)
    await file.commit()
    assert (await mount.volume.read_body(file.ino)).inode.mtime_ns == 5_000_000_000
    commits = len(mount.volume.commits)
    await set_mtime(mount, file, 6_000_000_000)
    file.adopt(await mount.volume.setattr(file.ino, SetAttr(mtime_ns=7_000_000_000)))
    assert file.inode.mtime_ns == 7_000_000_000, "of another mount, and newer than what was set here"
    await file.commit()
    await file.truncate(SetAttr(size_bytes=2))
    await file.commit()
    assert len(mount.volume.commits) == commits, "nothing was written since"
