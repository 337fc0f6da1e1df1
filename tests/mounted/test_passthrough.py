"""Files that the kernel writes by itself, on two real mounts: the daemon is not asked, and nobody sees a difference."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.mount_faults import content, until
from tests.mounted.conftest import Places
from tests.mounted.harness import Mount

pytestmark = pytest.mark.mounted
MIB = 1 << 20
SIZE = 5 * MIB + 12345
NEW = os.O_CREAT | os.O_WRONLY | os.O_TRUNC


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def west(places: Places) -> Mount:
    return places.pair.west


def requests(mount: Mount, kind: str) -> int:
    return int(mount.status()["fuse"]["requests_by_kind"].get(kind, 0))


def written(fd: int, data: bytes, offset: int = 0) -> None:
    assert os.pwrite(fd, data, offset) == len(data)


def test_a_new_file_is_written_without_the_daemon(here: Path, there: Path, west: Mount) -> None:
    data = content(1, SIZE)
    before = requests(west, "write")
    with opened(here / "new", NEW) as fd:
        written(fd, data[:MIB])
        assert os.fstat(fd).st_size == MIB
        assert os.stat(here / "new").st_size == MIB
        written(fd, data[MIB:], MIB)
        os.fsync(fd)
        assert (there / "new").read_bytes() == data
        assert os.stat(there / "new").st_mtime_ns == os.fstat(fd).st_mtime_ns
    assert requests(west, "write") == before
    assert (here / "new").read_bytes() == data


def test_closing_commits(here: Path, there: Path) -> None:
    for number in range(6):
        (here / f"f{number}").write_bytes(content(number, 100_000 * number))
        assert (there / f"f{number}").read_bytes() == content(number, 100_000 * number)


def test_what_is_truncated_is_written_anew(here: Path, there: Path) -> None:
    (here / "file").write_bytes(content(1, SIZE))
    (here / "file").write_bytes(content(2, MIB))
    assert (there / "file").read_bytes() == content(2, MIB)
    with opened(here / "file", os.O_WRONLY | os.O_TRUNC) as fd:
        assert (there / "file").read_bytes() == b""
        written(fd, b"x" * MIB)
        os.ftruncate(fd, 10)
        assert os.stat(there / "file").st_size == 10
        written(fd, b"y", 20)
    assert (there / "file").read_bytes() == b"x" * 10 + bytes(10) + b"y"


def test_every_kind_of_open_goes_on_beside_it(here: Path, there: Path) -> None:
    """Readers, writers, appenders and mappings of the same host see each other's bytes at once."""
    path = here / "file"
    with opened(path, NEW) as writing, opened(path) as reading, opened(path, os.O_RDWR) as both:
        written(writing, b"0123456789")
        assert os.pread(reading, 100, 0) == b"0123456789"
        assert os.pread(both, 100, 0) == b"0123456789"
        written(both, b"both", 2)
        assert os.pread(reading, 100, 0) == b"01both6789"
        with opened(path, os.O_WRONLY | os.O_APPEND) as appending:
            os.write(appending, b"+end")
        assert os.pread(reading, 100, 0) == b"01both6789+end"
        with mmap.mmap(both, 14) as mapped:
            mapped[0:2] = b"mm"
            mapped.flush()
        assert os.pread(reading, 100, 0) == b"mmboth6789+end"
        os.fsync(writing)
        assert (there / "file").read_bytes() == b"mmboth6789+end"
    assert path.read_bytes() == b"mmboth6789+end"


def test_a_mapping_that_outlives_its_descriptors(here: Path, there: Path) -> None:
    path = here / "file"
    with opened(path, NEW) as writing, opened(path, os.O_RDWR) as both:
        written(writing, bytes(SIZE))
        mapped = mmap.mmap(both, SIZE)
    with mapped:
        mapped[100:105] = b"later"
        mapped.flush()
        assert path.read_bytes()[100:105] == b"later"
    until(lambda: (there / "file").read_bytes()[100:105] == b"later", "what was mapped is committed")


def test_holes_and_allocation(here: Path, there: Path) -> None:
    with opened(here / "file", NEW) as fd:
        written(fd, b"end", 3 * MIB)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 3 * MIB
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        os.posix_fallocate(fd, 0, 4 * MIB)
        assert os.fstat(fd).st_size == 4 * MIB
    assert (there / "file").read_bytes() == bytes(3 * MIB) + b"end" + bytes(MIB - 3)


def test_a_file_is_committed_while_it_stays_open(here: Path, there: Path) -> None:
    with opened(here / "log", NEW) as fd:
        written(fd, b"line\n")
        until(lambda: (there / "log").read_bytes() == b"line\n", "the line is seen elsewhere")
        written(fd, b"more\n", 5)
        until(lambda: (there / "log").read_bytes() == b"line\nmore\n", "the other line too")


def test_removed_and_renamed_while_it_is_written(here: Path, there: Path) -> None:
    with opened(here / "tmp", NEW) as fd:
        written(fd, content(1, MIB))
        os.rename(here / "tmp", here / "final")
        written(fd, content(2, MIB), MIB)
    assert (there / "final").read_bytes() == content(1, MIB) + content(2, MIB)
    with opened(here / "gone", NEW) as fd, opened(here / "gone") as reading:
        written(fd, b"before")
        os.unlink(there / "gone")
        written(fd, b" after", 6)
        os.fsync(fd)
        assert os.pread(reading, 100, 0) == b"before after"
        assert os.fstat(fd).st_nlink == 0
    assert sorted(os.listdir(there)) == ["final"]


def test_both_mounts_write_one_new_file(here: Path, there: Path) -> None:
    with opened(here / "file", NEW) as west, opened(there / "file", os.O_WRONLY) as east:
        written(west, b"w" * MIB, 0)
        written(east, b"e" * MIB, MIB)
        os.fsync(west)
        os.fsync(east)
    assert (here / "file").read_bytes() == b"w" * MIB + b"e" * MIB
    assert (there / "file").read_bytes() == b"w" * MIB + b"e" * MIB


# -- reading ----------------------------------------------------------------------------------------------------------


def read_by_the_kernel(mount: Mount, path: Path, *, within_s: float = 60) -> int:
    """A descriptor that the kernel serves by itself: the file has been read once, and nobody has changed it lately."""
    path.read_bytes()
    found: list[int] = []

    def passes() -> bool:
        before = mount.status()["bodies"]["passthrough_opens"]
        fd = os.open(path, os.O_RDONLY)
        if mount.status()["bodies"]["passthrough_opens"] == before:
            os.pread(fd, 16 * MIB, 0)
            os.close(fd)
            return False
        found.append(fd)
        return True

    until(passes, "the kernel reads the file by itself", within_s)
    return found[0]


def test_a_file_that_is_all_here_is_read_without_the_daemon(here: Path, there: Path, west: Mount) -> None:
    data = content(1, SIZE)
    (there / "file").write_bytes(data)
    fd = read_by_the_kernel(west, here / "file")
    before = requests(west, "read")
    assert os.pread(fd, SIZE, 0) == data
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data
    assert os.stat(here / "file").st_size == SIZE
    os.close(fd)
    assert requests(west, "read") == before


@pytest.mark.parametrize("change", ["overwrite", "append", "truncate", "replace"])
def test_a_change_elsewhere_reaches_who_reads_by_passthrough(here: Path, there: Path, west: Mount, change: str) -> None:
    data = bytearray(content(1, SIZE))
    (there / "file").write_bytes(data)
    fd = read_by_the_kernel(west, here / "file")
    mapped = mmap.mmap(fd, MIB, prot=mmap.PROT_READ)
    if change == "overwrite":
        with opened(there / "file", os.O_RDWR) as writing:
            written(writing, b"new" * 1000, 500_000)
        data[500_000:503_000] = b"new" * 1000
    elif change == "append":
        with opened(there / "file", os.O_WRONLY | os.O_APPEND) as writing:
            os.write(writing, b"one more line\n")
        data += b"one more line\n"
    elif change == "truncate":
        os.truncate(there / "file", 2 * MIB + 5)
        del data[2 * MIB + 5 :]
    else:
        (there / "other").write_bytes(b"other")
        os.rename(there / "other", there / "file")
    until(lambda: os.pread(fd, 2 * SIZE, 0) == data, "the open descriptor shows the change")
    assert mapped[:] == data[:MIB]
    mapped.close()
    assert os.fstat(fd).st_size == len(data)
    os.close(fd)
    assert (here / "file").read_bytes() == (b"other" if change == "replace" else data)


def test_what_is_read_by_passthrough_can_be_written_here(here: Path, there: Path, west: Mount) -> None:
    """In every way; the reader sees it at once, the other mount when it is committed."""
    data = bytearray(content(1, SIZE))
    (there / "file").write_bytes(data)
    fd = read_by_the_kernel(west, here / "file")
    with opened(here / "file", os.O_RDWR) as writing:
        written(writing, b"here", 10)
        data[10:14] = b"here"
        assert os.pread(fd, SIZE, 0) == data
        os.fsync(writing)
        assert (there / "file").read_bytes() == data
        with mmap.mmap(writing, MIB) as mapped:
            mapped[20:26] = b"mapped"
            mapped.flush()
        data[20:26] = b"mapped"
    with opened(here / "file", os.O_WRONLY | os.O_APPEND) as writing:
        os.write(writing, b"+end")
        data += b"+end"
    assert os.pread(fd, 2 * SIZE, 0) == data
    os.truncate(here / "file", SIZE)
    del data[SIZE:]
    assert os.pread(fd, 2 * SIZE, 0) == data
    os.close(fd)
    until(lambda: (there / "file").read_bytes() == data, "all of it is committed")
    assert (here / "file").read_bytes() == data


def test_a_log_is_followed(here: Path, there: Path, west: Mount) -> None:
    """As tail -f does, with a file that is large enough to be read by passthrough."""
    data = bytearray(content(1, 2 * MIB))
    (there / "log").write_bytes(data)
    fd = read_by_the_kernel(west, here / "log")
    for number in range(3):
        with opened(there / "log", os.O_WRONLY | os.O_APPEND) as writing:
            line = b"line %d\n" % number
            os.write(writing, line)
        until(lambda at=len(data), line=line: os.pread(fd, 100, at) == line, "the new line")  # type: ignore[misc]
        data += line
    os.close(fd)


# -- in general -------------------------------------------------------------------------------------------------------


def test_times_that_are_set_stay(here: Path, there: Path) -> None:
    with opened(here / "file", NEW) as fd:
        written(fd, content(1, MIB))
        os.utime(fd, ns=(1_000_000_001, 2_000_000_002))
    assert os.stat(here / "file").st_mtime_ns == 2_000_000_002
    assert os.stat(there / "file").st_mtime_ns == 2_000_000_002


def test_status_says_which_way_is_used(here: Path, west: Mount) -> None:
    assert west.status()["passthrough"] == "in use"
    before = west.status()["bodies"]
    assert before["passthrough"] == 1
    with opened(here / "file", NEW):
        now = west.status()["bodies"]
    assert now["passthrough_files"] == now["working_copies"] == 1
    assert now["passthrough_opens"] == before["passthrough_opens"] + 1
