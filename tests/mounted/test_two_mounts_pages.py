"""The kernel keeps the pages of files; what the other mount commits is read at once all the same."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.clients import append_lines, write_file
from tests.mounted.conftest import Places
from tests.mounted.counting import asked, cached
from tests.mounted.harness import Mount

pytestmark = pytest.mark.mounted

SIZE = 300_000
READING = ("read", "getattr")


@pytest.fixture
def west(places: Places) -> Mount:
    return places.pair.west


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def test_a_file_is_read_again_without_the_daemon(here: Path, there: Path, west: Mount) -> None:
    (there / "file").write_bytes(b"x" * SIZE)
    with opened(here / "file") as fd:
        cached(west, lambda: os.pread(fd, SIZE, 0), READING)
    cached(west, lambda: (here / "file").read_bytes(), READING)
    assert (here / "file").read_bytes() == b"x" * SIZE


def test_what_was_written_here_is_kept_after_it_was_read(here: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"x" * SIZE)
    cached(west, lambda: (here / "file").read_bytes(), READING)
    overwrite(here / "file", b"y")
    assert (here / "file").read_bytes() == b"y" + b"x" * (SIZE - 1)
    cached(west, lambda: (here / "file").read_bytes(), READING)


def test_a_commit_elsewhere_is_read_at_once(here: Path, there: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"-" * SIZE)
    with opened(here / "file") as fd:
        for digit in (b"1", b"2", b"3"):
            cached(west, lambda: os.pread(fd, SIZE, 0), READING)
            overwrite(there / "file", digit * SIZE)
            assert os.pread(fd, SIZE, 0) == digit * SIZE
            assert (here / "file").read_bytes() == digit * SIZE


def test_a_mapping_sees_a_commit_elsewhere_while_its_directory_is_held(here: Path, there: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"-" * SIZE)
    with opened(here / "file") as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
        cached(west, lambda: os.pread(fd, SIZE, 0), READING)
        assert mapped[SIZE // 2] == ord("-")
        overwrite(there / "file", b"1" * SIZE)
        assert mapped[:] == b"1" * SIZE


def test_a_mapping_of_what_was_moved_here_sees_a_commit_elsewhere(here: Path, there: Path, west: Mount) -> None:
    for name in ("one", "other"):
        (here / name).mkdir()
    (here / "one" / "file").write_bytes(b"-" * SIZE)
    with opened(here / "one" / "file") as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
        cached(west, lambda: os.pread(fd, SIZE, 0), READING)
        assert mapped[SIZE // 2] == ord("-")
        (here / "one" / "file").rename(here / "other" / "file")
        overwrite(there / "other" / "file", b"1" * SIZE)
        assert mapped[:] == b"1" * SIZE


def test_a_commit_that_leaves_the_times_is_read_at_once(here: Path, there: Path, west: Mount) -> None:
    """Neither size nor mtime tell of it."""
    (here / "file").write_bytes(b"-" * SIZE)
    with opened(here / "file") as fd:
        for digit in (b"1", b"2", b"3"):
            cached(west, lambda: os.pread(fd, SIZE, 0), READING)
            before = os.stat(there / "file")
            for step in (b"x", digit):
                overwrite(there / "file", step * SIZE)
                os.utime(there / "file", ns=(before.st_atime_ns, before.st_mtime_ns))
                assert os.pread(fd, SIZE, 0) == step * SIZE
            assert (here / "file").read_bytes() == digit * SIZE


def test_listing_with_attributes_brings_no_old_bytes(here: Path, there: Path, west: Mount) -> None:
    """The listing speaks of the new body, of which the open file does not know yet."""
    (here / "file").write_bytes(b"-" * SIZE)
    with opened(here / "file") as fd:
        for digit in (b"1", b"2", b"3"):
            cached(west, lambda: os.pread(fd, SIZE, 0), READING)
            overwrite(there / "file", digit * SIZE)
            assert os.listdir(here) == ["file"]
            assert os.pread(fd, SIZE, 0) == digit * SIZE


def test_a_file_that_is_cut_or_grows_elsewhere(here: Path, there: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"x" * SIZE)
    with opened(here / "file") as fd:
        cached(west, lambda: os.pread(fd, SIZE, 0), READING)
        os.truncate(there / "file", 5000)
        assert os.pread(fd, SIZE, 0) == b"x" * 5000
        cached(west, lambda: os.pread(fd, 5000, 0), READING)
        os.truncate(there / "file", 6000)
        assert os.pread(fd, SIZE, 0) == b"x" * 5000 + bytes(1000)
        cached(west, lambda: os.pread(fd, 6000, 0), READING)
        append_lines(there / "file", b"more", 1)
        assert os.pread(fd, SIZE, 0) == b"x" * 5000 + bytes(1000) + b"more 000000\n"


def test_a_replaced_file_is_read_anew_and_the_open_one_stays(here: Path, there: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"old" * 100)
    with opened(here / "file") as fd:
        cached(west, lambda: os.pread(fd, SIZE, 0), READING)
        write_file(there / "file", b"new" * 100)
        assert (here / "file").read_bytes() == b"new" * 100
        assert os.pread(fd, SIZE, 0) == b"old" * 100


def test_a_symlink_is_read_once(here: Path, there: Path, west: Mount) -> None:
    os.symlink("one", there / "link")
    cached(west, lambda: os.readlink(here / "link"), ("readlink",))
    os.unlink(there / "link")
    os.symlink("another", there / "link")
    assert os.readlink(here / "link") == "another"
    os.readlink(here / "link")
    assert asked(west, lambda: os.readlink(here / "link"), ("readlink",)) == 0


@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_SYNC])
def test_what_is_opened_past_the_pages_can_be_mapped(here: Path, flags: int) -> None:
    (here / "file").write_bytes(b"x" * 5000)
    with opened(here / "file", os.O_RDWR | flags) as fd, mmap.mmap(fd, 5000) as mapped:
        assert mapped[:] == b"x" * 5000
        mapped[10] = ord("y")
        mapped.flush()
        os.write(fd, b"z")
        os.fsync(fd)
    found = (here / "file").read_bytes()
    assert found[10:11] == b"y"
    assert (found[-1:] if flags == os.O_APPEND else found[:1]) == b"z"


def test_reads_are_never_behind(here: Path, there: Path, client: Client) -> None:
    """Many rounds of any change on either mount, read in every way, with appends to a neighbour meanwhile."""
    rng = random.Random(7)
    for directory in (here, there):
        (directory / f"log{directory.name}").touch()
    logging = client.start(append_lines, there / "log", b"line", 40)
    body = bytearray(rng.randbytes(SIZE))
    (here / "file").write_bytes(body)
    fds = [os.open(directory / "file", os.O_RDWR) for directory in (here, there)]
    for number in range(120):
        changed = rng.randrange(2)
        at = rng.randrange(len(body))
        piece = rng.randbytes(rng.choice([1, 4096, 70_000]))
        if rng.random() < 0.15:
            os.ftruncate(fds[changed], at)
            del body[at:]
        if rng.random() < 0.3:
            piece = piece[:1]
            append = os.open((here, there)[changed] / "file", os.O_WRONLY | os.O_APPEND)
            os.write(append, piece)
            os.close(append)
            body += piece
        else:
            at = min(at, len(body))
            os.pwrite(fds[changed], piece, at)
            os.fsync(fds[changed])
            body[at : at + len(piece)] = piece
        for side in (1 - changed, changed):
            assert os.pread(fds[side], 2 * SIZE, 0) == body, f"round {number}"
        if number % 3 == 0:
            for directory in (here, there):
                assert (directory / "file").read_bytes() == body
    for fd in fds:
        os.close(fd)
    logging.result()
