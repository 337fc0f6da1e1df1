"""What two mounts do to one file at once: nothing is lost, and a commit is seen whole."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.mounted import clients
from tests.mounted.client import Client

pytestmark = pytest.mark.mounted

MIB = 1 << 20


@pytest.mark.parametrize("unit", [100, 50_000, MIB])
def test_writes_to_different_ranges_are_both_kept(here: Path, there: Path, unit: int) -> None:
    (here / "file").write_bytes(b"-" * (4 * unit))
    with (here / "file").open("r+b") as one, (there / "file").open("r+b") as two:
        one.write(b"1" * unit)
        two.seek(2 * unit)
        two.write(b"2" * unit)
    wanted = b"1" * unit + b"-" * unit + b"2" * unit + b"-" * unit
    assert (here / "file").read_bytes() == wanted
    assert (there / "file").read_bytes() == wanted


@pytest.mark.parametrize("count", [40])
def test_appends_of_both_mounts_all_stay(
    here: Path, there: Path, client: Client, other_client: Client, count: int
) -> None:
    running = [
        client.start(clients.append_lines, here / "log", b"west", count),
        other_client.start(clients.append_lines, there / "log", b"east", count),
    ]
    for each in running:
        each.result()
    for path in (here / "log", there / "log"):
        lines = path.read_bytes().split(b"\n")[:-1]
        for tag in (b"west", b"east"):
            assert [line for line in lines if line.startswith(tag)] == [b"%s %06d" % (tag, n) for n in range(count)]
        assert len(lines) == 2 * count


def test_uncommitted_appends_of_both_mounts_all_stay(here: Path, there: Path) -> None:
    with (here / "log").open("ab") as one, (there / "log").open("ab") as two:
        for number in range(20):
            one.write(b"one %03d\n" % number)
            one.flush()
            two.write(b"two %03d\n" % number)
            two.flush()
    lines = (here / "log").read_bytes().split(b"\n")[:-1]
    assert sorted(lines) == sorted(b"%s %03d" % (tag, number) for tag in (b"one", b"two") for number in range(20))
    assert (there / "log").read_bytes() == (here / "log").read_bytes()


def test_what_was_fsynced_is_seen_before_close(here: Path, there: Path) -> None:
    with (here / "file").open("wb") as writing, (there / "file").open("rb") as reading:
        for number in range(5):
            writing.write(b"%d" % number * 30_000)
            writing.flush()
            os.fsync(writing.fileno())
            assert reading.read() == b"%d" % number * 30_000


def test_a_reader_sees_a_commit_whole_or_not_at_all(here: Path, there: Path, client: Client) -> None:
    size = 64_000
    (here / "file").write_bytes(b"0" * size)
    client.call(clients.open_as, "f", here / "file", os.O_RDWR)
    for number in range(1, 10):
        digit = b"%d" % number
        client.call(clients.write, "f", digit * size, 0)
        committing = client.start(clients.fsync, "f")
        fd = os.open(there / "file", os.O_RDONLY | os.O_DIRECT)
        seen = os.pread(fd, size, 0)
        os.close(fd)
        assert len(seen) == size
        assert len(set(seen)) == 1
        committing.result()
        assert (there / "file").read_bytes() == digit * size


def test_replacing_by_rename_is_atomic_for_readers(here: Path, there: Path, client: Client) -> None:
    bodies = {bytes([number]) * (20_000 * (number + 1)) for number in range(6)}
    clients.write_file(here / "file", min(bodies))
    for body in sorted(bodies):
        replacing = client.start(clients.write_file, here / "file", body)
        assert (there / "file").read_bytes() in bodies
        replacing.result()
        assert (there / "file").read_bytes() == body


def test_the_last_commit_of_one_range_wins(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"-" * 20_000)
    one, two = os.open(here / "file", os.O_RDWR), os.open(there / "file", os.O_RDWR)
    os.pwrite(one, b"1" * 10_000, 0)
    os.pwrite(two, b"2" * 10_000, 5_000)
    os.fsync(two)
    os.fsync(one)
    wanted = b"1" * 10_000 + b"2" * 5_000 + b"-" * 5_000
    assert (os.pread(one, 20_000, 0), os.pread(two, 20_000, 0)) == (wanted, wanted)
    os.close(one)
    os.close(two)
    assert (there / "file").read_bytes() == wanted


def test_many_random_writes_on_both_mounts(here: Path, there: Path) -> None:
    size = 3 * MIB
    rng = random.Random(99)
    body = bytearray(rng.randbytes(size))
    (here / "file").write_bytes(body)
    fds = [os.open(path / "file", os.O_RDWR) for path in (here, there)]
    for number in range(60):
        writer, reader = fds[number % 2], fds[1 - number % 2]
        at = rng.randrange(size)
        piece = rng.randbytes(rng.choice([1, 17, 4096, 70_000]))[: size - at]
        os.pwrite(writer, piece, at)
        body[at : at + len(piece)] = piece
        os.fsync(writer)
        look = max(0, at - 100)
        assert os.pread(reader, len(piece) + 200, look) == body[look : look + len(piece) + 200]
    for fd in fds:
        os.close(fd)
    assert (there / "file").read_bytes() == body
    assert (here / "file").read_bytes() == body
