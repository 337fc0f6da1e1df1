"""open(2) and what its flags promise; everything is looked at on the other mount too."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.clients import errno_of

pytestmark = pytest.mark.mounted

RDWR_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def test_excl_refuses_what_the_other_mount_has_made(here: Path, there: Path) -> None:
    os.close(os.open(here / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    with pytest.raises(FileExistsError):
        os.open(there / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    (there / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        os.open(here / "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def test_creat_without_excl_opens_what_is_there(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"kept")
    fd = os.open(there / "file", os.O_CREAT | os.O_RDONLY, 0o600)
    assert os.read(fd, 10) == b"kept"
    os.close(fd)
    assert stat.S_IMODE((there / "file").stat().st_mode) == 0o644


def test_a_new_file_has_its_mode_less_the_umask(here: Path, there: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open(here / "file", RDWR_NEW, 0o6777))
        (here / "directory").mkdir(0o777)
        os.mkfifo(here / "fifo", 0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE((there / "file").stat().st_mode) == 0o6750
    assert stat.S_IMODE((there / "directory").stat().st_mode) == 0o750
    assert stat.S_IMODE((there / "fifo").stat().st_mode) == 0o640


@pytest.mark.parametrize("size", [10, 300_000])
def test_trunc(here: Path, there: Path, size: int) -> None:
    (here / "file").write_bytes(b"x" * size)
    fd = os.open(there / "file", os.O_WRONLY | os.O_TRUNC)
    assert (here / "file").stat().st_size == 0
    os.write(fd, b"new")
    os.close(fd)
    assert (here / "file").read_bytes() == b"new"


@pytest.mark.parametrize("size", [10, 300_000])
def test_append_ignores_the_offset(here: Path, there: Path, size: int) -> None:
    (here / "file").write_bytes(b"a" * size)
    fd = os.open(there / "file", os.O_WRONLY | os.O_APPEND)
    os.lseek(fd, 3, os.SEEK_SET)
    assert os.write(fd, b"bcd") == 3
    assert os.lseek(fd, 0, os.SEEK_CUR) == size + 3
    os.close(fd)
    assert (here / "file").read_bytes() == b"a" * size + b"bcd"


def test_two_descriptors_that_append_do_not_overwrite_each_other(here: Path, there: Path) -> None:
    fds = [os.open(here / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT) for _ in range(2)]
    for number in range(50):
        for fd in fds:
            os.write(fd, b"%d:%03d\n" % (fds.index(fd), number))
    for fd in fds:
        os.close(fd)
    lines = (there / "file").read_bytes().split(b"\n")[:-1]
    assert lines == [b"%d:%03d" % (which, number) for number in range(50) for which in range(2)]


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_synchronous_write_is_seen_elsewhere_at_once(here: Path, there: Path, flag: int, size: int) -> None:
    fd = os.open(here / "file", RDWR_NEW | flag)
    try:
        os.write(fd, b"x" * size)
        assert (there / "file").read_bytes() == b"x" * size
        os.pwrite(fd, b"yy", size - 1)
        assert (there / "file").read_bytes() == b"x" * (size - 1) + b"yy"
    finally:
        os.close(fd)


def test_direct_reads_and_writes(here: Path, there: Path) -> None:
    page = mmap.mmap(-1, 8192)
    page[:] = bytes(range(256)) * 32
    fd = os.open(here / "file", RDWR_NEW | os.O_DIRECT)
    try:
        assert os.pwritev(fd, [page], 0) == 8192
        assert os.pwritev(fd, [page], 1 << 20) == 8192
        os.fsync(fd)
        back = mmap.mmap(-1, 8192)
        reader = os.open(there / "file", os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.preadv(reader, [back], 1 << 20) == 8192
            assert back[:] == page[:]
            assert os.preadv(reader, [back], 8192) == 8192
            assert back[:] == bytes(8192)
            # the next direct read on a descriptor that is open sees the next commit
            page[:5] = b"later"
            os.pwritev(fd, [page], 0)
            os.fsync(fd)
            assert os.preadv(reader, [back], 0) == 8192
            assert back[:5] == b"later"
        finally:
            os.close(reader)
    finally:
        os.close(fd)


def test_a_file_that_was_unlinked_goes_on_working(here: Path, there: Path) -> None:
    fd = os.open(here / "file", RDWR_NEW)
    try:
        os.write(fd, b"before")
        os.fsync(fd)
        other = os.open(there / "file", os.O_RDWR)
        (there / "file").unlink()
        assert not (here / "file").exists()
        os.pwrite(fd, b" and after", 6)
        assert os.pread(fd, 100, 0) == b"before and after"
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_size == 16
        os.ftruncate(fd, 6)
        os.fchmod(fd, 0o600)
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"before"
        assert os.pread(other, 100, 0) == b"before"
        os.close(other)
    finally:
        os.close(fd)
    assert list(here.iterdir()) == []


def test_a_large_unlinked_file_is_still_read(here: Path, there: Path) -> None:
    body = os.urandom(3 << 20)
    (here / "file").write_bytes(body)
    with (there / "file").open("rb") as file:
        (there / "file").unlink()
        assert file.read() == body


def test_the_name_of_an_unlinked_open_file_is_free(here: Path, there: Path) -> None:
    fd = os.open(here / "file", RDWR_NEW)
    os.write(fd, b"old")
    (here / "file").unlink()
    (there / "file").write_bytes(b"new")
    assert os.pread(fd, 10, 0) == b"old"
    os.write(fd, b"er")
    os.close(fd)
    assert (here / "file").read_bytes() == b"new"


def test_rename_over_an_open_file(here: Path, there: Path) -> None:
    (here / "target").write_bytes(b"replaced")
    with (there / "target").open("r+b") as opened:
        (here / "source").write_bytes(b"replacement")
        (here / "source").rename(here / "target")
        assert opened.read() == b"replaced"
        opened.seek(0)
        opened.write(b"REPLACED")
        opened.flush()
        assert (there / "target").read_bytes() == b"replacement"
    assert (here / "target").read_bytes() == b"replacement"


def test_an_open_file_is_still_itself_after_a_rename(here: Path, there: Path) -> None:
    with (here / "old").open("wb") as file:
        (there / "directory").mkdir()
        (here / "old").rename(here / "directory" / "new")
        file.write(b"written after it")
    assert (there / "directory" / "new").read_bytes() == b"written after it"
    with (here / "directory" / "new").open("ab") as file:
        (there / "directory" / "new").rename(there / "moved elsewhere")
        file.write(b", and again")
    assert (there / "moved elsewhere").read_bytes() == b"written after it, and again"


def test_directory_and_nofollow(here: Path) -> None:
    (here / "file").touch()
    (here / "link").symlink_to("file")
    for name, flags, expected in [
        ("file", os.O_DIRECTORY, errno.ENOTDIR),
        ("link", os.O_NOFOLLOW, errno.ELOOP),
        (".", os.O_WRONLY, errno.EISDIR),
    ]:
        assert errno_of(os.open, here / name, flags) == expected


def test_an_o_path_descriptor_can_be_looked_at(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"text")
    fd = os.open(there / "file", os.O_PATH)
    try:
        assert os.fstat(fd).st_size == 4
        assert errno_of(os.read, fd, 1) == errno.EBADF
    finally:
        os.close(fd)


def test_a_file_without_permission_is_usable_by_who_made_it(here: Path, there: Path, nobody: Client) -> None:
    fd = nobody.call(os.open, "file", RDWR_NEW, 0)
    assert nobody.call(os.write, fd, b"made with mode 0") == 16
    nobody.call(os.close, fd)
    assert nobody.call(errno_of, os.open, "file", os.O_RDONLY) == errno.EACCES
    found = (there / "file").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_size) == (0, 65534, 16)


def test_tmpfile_is_not_offered(here: Path) -> None:
    assert errno_of(os.open, here, os.O_TMPFILE | os.O_RDWR) == errno.EOPNOTSUPP
