"""Staging files: what is written is read, frozen while pinned, and gives its room back; dead mounts are cleaned up."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollofs.fs import local_io, staging
from apollofs.fs.errors import CacheDirectoryUnusable, StagingFailed, StagingFull
from apollofs.fs.staging import MEMORY_BYTES_MAX, StagingArea, StagingFile, open_staging

LARGE = b"L" * (MEMORY_BYTES_MAX + 1)
HUGE = b"H" * (local_io.INLINE_BYTES_MAX + 1)


@pytest.fixture
async def area(tmp_path: Path) -> AsyncIterator[StagingArea]:
    async with open_staging(str(tmp_path), 0) as opened:
        yield opened


async def content(file: StagingFile, size: int) -> bytes:
    """What is staged of `[0, size)`, dots elsewhere."""
    shown = bytearray(b"." * size)
    for segment in file.map.within(0, size):
        shown[segment.offset : segment.end] = await file.read(segment)
    return bytes(shown)


def files_in(area: StagingArea) -> list[str]:
    return sorted(name for name in os.listdir(area.directory) if name != ".lock")


async def test_small_files_stay_in_memory(area: StagingArea) -> None:
    file = area.open_file(7)
    await file.write(5, b"abc")
    await file.write(6, b"XY")
    assert await content(file, 10) == b".....aXY.."
    assert files_in(area) == []
    file.close()


async def test_larger_ones_go_to_disk_and_leave_nothing_there(area: StagingArea) -> None:
    file = area.open_file(7)
    await file.write(5, b"abc")
    await file.write(8, LARGE)
    await file.write(8 + len(LARGE), HUGE)
    assert await content(file, 8 + len(LARGE) + len(HUGE)) == b".....abc" + LARGE + HUGE
    assert files_in(area) == ["0000000000000007-0"]
    file.close()
    assert files_in(area) == []


@pytest.mark.parametrize("first", [b"a" * 100, LARGE], ids=["memory", "disk"])
async def test_what_is_pinned_does_not_change(area: StagingArea, first: bytes) -> None:
    file = area.open_file(1)
    await file.write(0, first)
    snapshot = file.map.segments()
    with file.pinned():
        await file.write(10, b"b" * 20)
        file.drop(50, 60)
        assert b"".join([await file.read(segment) for segment in snapshot]) == first
        file.forget(snapshot)
    assert await content(file, 40) == b"." * 10 + b"b" * 20 + b"." * 10
    file.close()


async def test_a_page_that_is_written_again_and_again_takes_its_room_once(area: StagingArea) -> None:
    file = area.open_file(1)
    await file.write(0, LARGE)
    for _ in range(50):
        await file.write(4096, b"p" * 4096)
    assert os.stat(os.path.join(area.directory, files_in(area)[0])).st_size == len(LARGE)
    file.close()


async def test_room_is_given_back(area: StagingArea) -> None:
    file = area.open_file(1)
    path = os.path.join(area.directory, "0000000000000001-0")
    await file.write(0, HUGE * 8)
    before = os.stat(path).st_blocks
    file.drop(4096, len(HUGE) * 7)
    assert os.stat(path).st_blocks < before / 4
    file.drop(0)
    assert os.stat(path).st_size == 0
    await file.write(0, b"again")
    assert await content(file, 5) == b"again"
    file.close()


async def test_memory_of_the_mount_is_bounded_and_given_back(area: StagingArea) -> None:
    files = [area.open_file(ino) for ino in range(4)]
    area._memory_left = 100
    for file in files:
        await file.write(0, b"x" * 40)
    assert len(files_in(area)) == 2
    for file in files:
        assert await content(file, 40) == b"x" * 40
        file.close()
    assert area._memory_left == 100


async def test_a_full_disk_is_told_and_changes_nothing(area: StagingArea, monkeypatch: pytest.MonkeyPatch) -> None:
    file = area.open_file(1)
    await file.write(0, LARGE)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(local_io, "write_fully", full)
        with pytest.raises(StagingFull):
            await file.write(10, HUGE)
    assert await content(file, len(LARGE)) == LARGE
    await file.write(0, b"more")
    assert await content(file, 6) == b"moreLL"
    file.close()


async def test_the_disk_keeps_its_reserve(tmp_path: Path) -> None:
    asked: list[int] = []

    async def make_room(size: int) -> None:
        asked.append(size)

    async with open_staging(str(tmp_path), 1 << 60) as area:
        area.make_room = make_room
        file = area.open_file(1)
        await file.write(0, b"small, and so in memory")
        with pytest.raises(StagingFull):
            await file.write(0, LARGE)
        assert len(asked) == 1
        assert asked[0] > 0
        file.close()


async def test_a_failing_disk_is_no_full_one(area: StagingArea) -> None:
    file = area.open_file(1)
    await file.write(0, LARGE)
    os.truncate(os.path.join(area.directory, files_in(area)[0]), 10)
    with pytest.raises(StagingFailed):
        await content(file, 100)
    file.close()


async def test_mounts_that_share_a_directory_leave_each_other_alone(tmp_path: Path) -> None:
    async with open_staging(str(tmp_path), 0) as first:
        file = first.open_file(1)
        await file.write(0, LARGE)
        async with open_staging(str(tmp_path), 0) as second:
            assert second.directory != first.directory
            assert await content(file, 3) == b"LLL"
        assert files_in(first) != []
        file.close()
    assert [name for name in os.listdir(tmp_path / "staging") if name != ".lock"] == []


async def test_what_dead_mounts_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / "staging" / "deadbeef"
    dead.mkdir(parents=True)
    (dead / "0000000000000001-0").write_bytes(b"x")
    async with open_staging(str(tmp_path), 0):
        assert not dead.exists()


async def test_a_cache_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheDirectoryUnusable):
        async with open_staging(str(tmp_path / "file"), 0):
            pass


writes = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "drop", "pin", "unpin", "shift"]), st.integers(0, 60), st.integers(1, 30)
    ),
    max_size=30,
)


@settings(deadline=None)
@given(plan=writes, in_memory=st.booleans())
async def test_random_writes(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int, int]], in_memory: bool
) -> None:
    async with open_staging(str(tmp_path_factory.mktemp("staging")), 0) as area:
        area._memory_left = staging.MEMORY_BYTES_OF_MOUNT_MAX if in_memory else 0
        file = area.open_file(1)
        model: dict[int, int] = {}
        pins = 0
        for number, (kind, offset, length) in enumerate(plan):
            if kind == "write":
                await file.write(offset, bytes([number + 1]) * length)
                model |= dict.fromkeys(range(offset, offset + length), number + 1)
            elif kind == "drop":
                file.drop(offset, offset + length)
                model = {at: byte for at, byte in model.items() if not offset <= at < offset + length}
            elif kind == "shift":
                file.shift(offset, length)
                model = {at + length if at >= offset else at: byte for at, byte in model.items()}
            elif kind == "pin":
                file.pin()
                pins += 1
            elif pins:
                file.unpin()
                pins -= 1
            expected = bytes(model.get(at, ord(".")) for at in range(2000))
            assert await content(file, 2000) == expected
        file.close()
