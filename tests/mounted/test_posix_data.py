"""Bytes: sizes, holes, truncation, overwriting, mapping, allocation, seeking, copying; read on the other mount."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.clients import errno_of, is_random, save_random

pytestmark = pytest.mark.mounted

MIB = 1 << 20
LARGEST = (1 << 63) - 1 - MIB
"""Size of the largest file."""
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
LIBC = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def made(path: Path, body: bytes) -> int:
    """A descriptor of a new file whose body is committed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert os.write(fd, body) == len(body)
    os.fsync(fd)
    return fd


# around the inline limit, the page, the block of the volume, and several blocks
SIZES = [0, 1, 4095, 4096, 8192, 8193, MIB - 1, MIB, MIB + 1, 5 * MIB + 12345]


@pytest.mark.parametrize("size", SIZES)
def test_a_body_of_each_size_is_read_elsewhere(here: Path, there: Path, size: int) -> None:
    body = random.Random(size).randbytes(size)
    (here / "file").write_bytes(body)
    assert (there / "file").stat().st_size == size
    assert (there / "file").read_bytes() == body


@pytest.mark.slow
def test_a_checkpoint_is_saved_on_one_mount_and_loaded_on_the_other(
    here: Path, there: Path, client: Client, other_client: Client
) -> None:
    size = 48 * MIB + 4321
    ranks = list(enumerate((client, other_client)))
    saving = [each.start(save_random, here / f"rank{rank}", rank, size) for rank, each in ranks]
    for each in saving:
        each.result()
    loading = [each.start(is_random, there / f"rank{rank}", rank, size) for rank, each in ranks]
    assert [each.result() for each in loading] == [True, True]
    assert sorted(os.listdir(there)) == ["rank0", "rank1"]


@pytest.mark.parametrize("size", [9, 100_000, 3 * MIB])
def test_overwriting_in_the_middle(here: Path, there: Path, size: int) -> None:
    body = bytearray(random.Random(7).randbytes(size))
    (here / "file").write_bytes(body)
    rng = random.Random(size)
    for mount in (here, there, here, there):
        with (mount / "file").open("r+b") as file:
            for _ in range(5):
                at = rng.randrange(size)
                piece = rng.randbytes(rng.randrange(1, max(2, size // 4)))[: size - at]
                file.seek(at)
                file.write(piece)
                body[at : at + len(piece)] = piece
        other = there if mount is here else here
        assert (other / "file").read_bytes() == body


def test_sparse_files_store_only_what_was_written(here: Path, there: Path) -> None:
    fd = made(here / "file", b"")
    os.pwrite(fd, b"x" * 4096, 64 * MIB)
    os.pwrite(fd, b"y" * 4096, 512 * MIB)
    os.close(fd)
    found = (there / "file").stat()
    assert found.st_size == 512 * MIB + 4096
    assert 0 < found.st_blocks * 512 <= 64 * 1024
    with (there / "file").open("rb") as file:
        file.seek(64 * MIB - 2)
        assert file.read(4) == b"\0\0xx"
        assert file.read(0) == b""
        file.seek(300 * MIB)
        assert file.read(MIB) == bytes(MIB)


def test_blocks_are_counted_as_stored(here: Path, there: Path) -> None:
    (here / "full").write_bytes(b"z" * (2 * MIB))
    assert (there / "full").stat().st_blocks * 512 == 2 * MIB
    os.truncate(here / "full", 4096)
    assert (there / "full").stat().st_blocks * 512 == 4096
    (here / "empty").touch()
    assert (there / "empty").stat().st_blocks == 0


@pytest.mark.parametrize("size", [100, 3 * MIB])
def test_truncate_down_and_up_leaves_zeros(here: Path, there: Path, size: int) -> None:
    body = random.Random(3).randbytes(size)
    (here / "file").write_bytes(body)
    os.truncate(there / "file", size // 3)
    assert (here / "file").read_bytes() == body[: size // 3]
    os.truncate(here / "file", size)
    assert (there / "file").read_bytes() == body[: size // 3] + bytes(size - size // 3)


def test_truncating_an_open_file_with_uncommitted_bytes(here: Path, there: Path) -> None:
    fd = made(here / "file", b"committed, ")
    os.pwrite(fd, b"dirty and long", 11)
    os.ftruncate(fd, 16)
    assert os.fstat(fd).st_size == 16
    assert os.pread(fd, 100, 0) == b"committed, dirty"
    os.ftruncate(fd, 20)
    os.close(fd)
    assert (there / "file").read_bytes() == b"committed, dirty\0\0\0\0"


def test_an_open_file_sees_the_other_mounts_truncate(here: Path, there: Path) -> None:
    fd = made(here / "file", b"0123456789")
    os.truncate(there / "file", 4)
    assert os.fstat(fd).st_size == 4
    assert os.pread(fd, 100, 0) == b"0123"
    os.close(fd)


def test_a_file_larger_than_the_largest_is_efbig(here: Path, there: Path) -> None:
    fd = made(here / "file", b"x")
    try:
        assert errno_of(os.pwrite, fd, b"y", (1 << 63) - 2) == errno.EFBIG
        assert errno_of(os.pwrite, fd, b"y" * 8192, LARGEST - 8191) == errno.EFBIG
        assert errno_of(os.ftruncate, fd, (1 << 63) - 1) == errno.EFBIG
        assert errno_of(os.truncate, here / "file", LARGEST + 1) == errno.EFBIG
        assert errno_of(os.ftruncate, fd, -1) == errno.EINVAL
        assert os.fstat(fd).st_size == 1
        assert os.pwrite(fd, b"y", LARGEST - 1) == 1
    finally:
        os.close(fd)
    assert (there / "file").stat().st_size == LARGEST
    assert (there / "file").stat().st_blocks <= 16


# -- mmap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5000, 3 * MIB])
def test_a_shared_mapping_is_written_back(here: Path, there: Path, size: int) -> None:
    fd = made(here / "file", b"-" * size)
    with mmap.mmap(fd, size) as mapped:
        mapped[0:5] = b"first"
        mapped[size - 4 : size] = b"last"
        mapped.flush()
        os.fsync(fd)
        assert (there / "file").read_bytes() == b"first" + b"-" * (size - 9) + b"last"
        mapped[100:104] = b"more"
    os.close(fd)
    assert (there / "file").read_bytes()[98:106] == b"--more--"


def test_a_mapping_outlives_its_descriptor(here: Path, there: Path) -> None:
    fd = made(here / "file", bytes(8192))
    mapped = mmap.mmap(fd, 8192)
    os.close(fd)
    mapped[4096:4099] = b"abc"
    mapped.flush()
    mapped.close()
    fd = os.open(here / "file", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert (there / "file").read_bytes()[4095:4100] == b"\0abc\0"


def test_a_private_mapping_changes_nothing(here: Path, there: Path) -> None:
    fd = made(here / "file", b"original")
    with mmap.mmap(fd, 8, access=mmap.ACCESS_COPY) as mapped:
        mapped[:] = b"changed!"
        assert os.pread(fd, 8, 0) == b"original"
    os.close(fd)
    assert (there / "file").read_bytes() == b"original"


def test_a_mapping_and_a_descriptor_see_each_other(here: Path) -> None:
    fd = made(here / "file", b"a" * 8192)
    with mmap.mmap(fd, 8192) as mapped:
        os.pwrite(fd, b"written", 10)
        assert mapped[10:17] == b"written"
        mapped[4000:4006] = b"mapped"
        assert os.pread(fd, 6, 4000) == b"mapped"
    os.close(fd)


def test_a_mapping_sees_the_other_mounts_commit_once_it_is_read_again(here: Path, there: Path) -> None:
    fd = made(here / "file", b"1" * 4096)
    with mmap.mmap(fd, 4096, prot=mmap.PROT_READ) as mapped:
        assert mapped[:1] == b"1"
        (there / "file").write_bytes(b"2" * 4096)
        os.close(os.open(here / "file", os.O_RDONLY))
        assert os.pread(fd, 1, 0) == b"2"
        assert mapped[:1] == b"2"
    os.close(fd)


# -- fallocate, lseek, copy_file_range -------------------------------------------------------------------------------


def test_fallocate_grows(here: Path, there: Path) -> None:
    fd = made(here / "file", b"text")
    fallocate(fd, 0, 0, 2 * MIB)
    os.fsync(fd)
    assert (there / "file").stat().st_size == 2 * MIB
    fallocate(fd, KEEP_SIZE, 2 * MIB, MIB)
    os.posix_fallocate(fd, 0, 100)
    os.close(fd)
    assert (there / "file").read_bytes() == b"text" + bytes(2 * MIB - 4)


@pytest.mark.parametrize("size", [6000, 3 * MIB])
@pytest.mark.parametrize("mode", [PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_a_range_becomes_zeros(here: Path, there: Path, mode: int, size: int) -> None:
    body = b"#" * size
    fd = made(here / "file", body)
    fallocate(fd, mode, 1000, 4000)
    assert os.pread(fd, 6000, 0) == (b"#" * 1000 + bytes(4000) + b"#" * 1000)
    fallocate(fd, mode, size - 100, 300)
    os.close(fd)
    wanted = b"#" * 1000 + bytes(4000) + b"#" * (size - 5100) + bytes(100)
    if mode == ZERO_RANGE:
        wanted += bytes(200)
    assert (there / "file").read_bytes() == wanted


def test_punching_frees_what_was_stored(here: Path, there: Path) -> None:
    fd = made(here / "file", b"#" * (4 * MIB))
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, MIB, 2 * MIB)
    os.close(fd)
    assert (there / "file").stat().st_blocks * 512 == 2 * MIB
    assert (there / "file").stat().st_size == 4 * MIB


def test_what_fallocate_refuses(here: Path) -> None:
    fd = made(here / "file", b"text")
    for mode, offset, length, expected in [
        (COLLAPSE, 0, 4096, {errno.EOPNOTSUPP}),
        (0x20, 0, 4096, {errno.EOPNOTSUPP}),
        (0x40, 0, 4096, {errno.EOPNOTSUPP}),
        (PUNCH_HOLE, 0, 4096, {errno.EOPNOTSUPP, errno.EINVAL}),
        (0, 0, 0, {errno.EINVAL}),
        (0, -1, 10, {errno.EINVAL}),
        (0, LARGEST - 4095, 4096, {errno.EFBIG}),
    ]:
        assert errno_of(fallocate, fd, mode, offset, length) in expected, mode
    os.close(fd)
    reader = os.open(here / "file", os.O_RDONLY)
    assert errno_of(fallocate, reader, 0, 0, 10) == errno.EBADF
    os.close(reader)


def test_seek_data_and_hole(here: Path, there: Path) -> None:
    fd = made(here / "file", b"")
    os.pwrite(fd, b"d" * MIB, 2 * MIB)
    os.ftruncate(fd, 8 * MIB)
    # as written, and as committed
    assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
    os.close(fd)
    reader = os.open(there / "file", os.O_RDONLY)
    try:
        assert os.lseek(reader, 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(reader, 2 * MIB + 5, os.SEEK_DATA) == 2 * MIB + 5
        assert os.lseek(reader, 0, os.SEEK_HOLE) == 0
        assert os.lseek(reader, 2 * MIB, os.SEEK_HOLE) == 3 * MIB
        for offset, whence in ((3 * MIB, os.SEEK_DATA), (8 * MIB, os.SEEK_HOLE), (9 * MIB, os.SEEK_DATA)):
            assert errno_of(os.lseek, reader, offset, whence) == errno.ENXIO
        assert os.lseek(reader, -1, os.SEEK_END) == 8 * MIB - 1
        assert errno_of(os.lseek, reader, -1, os.SEEK_SET) == errno.EINVAL
    finally:
        os.close(reader)


@pytest.mark.parametrize("size", [5000, 3 * MIB + 77])
def test_copy_file_range(here: Path, there: Path, size: int) -> None:
    body = random.Random(11).randbytes(size)
    source = made(here / "source", body)
    target = made(here / "target", b"0123456789")
    copied = 0
    while copied < size:
        done = os.copy_file_range(source, target, size - copied, copied, 10 + copied)
        assert done > 0
        copied += done
    assert os.copy_file_range(source, target, 10, size, 0) == 0
    os.close(source)
    os.close(target)
    assert (there / "target").read_bytes() == b"0123456789" + body


def test_a_copy_within_one_file_must_not_overlap(here: Path, there: Path) -> None:
    fd = made(here / "file", b"abcdefgh")
    assert errno_of(os.copy_file_range, fd, fd, 4, 0, 2) == errno.EINVAL
    assert os.copy_file_range(fd, fd, 4, 0, 4) == 4
    os.close(fd)
    assert (there / "file").read_bytes() == b"abcdabcd"


def test_vectors_and_zero_bytes(here: Path, there: Path) -> None:
    fd = made(here / "file", b"")
    assert os.pwrite(fd, b"", 100) == 0
    assert os.fstat(fd).st_size == 0
    assert os.writev(fd, [b"one ", b"", b"two ", b"three"]) == 13
    os.close(fd)
    assert (there / "file").read_bytes() == b"one two three"


def test_sync_commits_everything(here: Path, there: Path) -> None:
    fd = os.open(here / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"not closed")
    assert LIBC.syncfs(fd) == 0
    os.fsync(fd)
    assert (there / "file").read_bytes() == b"not closed"
    os.close(fd)
