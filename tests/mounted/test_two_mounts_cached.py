"""The kernel of each mount caches names and attributes; what the other mount changes is seen at once all the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.clients import errno_of
from tests.mounted.conftest import Places
from tests.mounted.counting import cached
from tests.mounted.harness import Mount

pytestmark = pytest.mark.mounted

NAMES = [f"name{number}" for number in range(6)]


def exists(path: Path) -> bool:
    return errno_of(os.stat, path) == 0


@pytest.fixture
def west(places: Places) -> Mount:
    return places.pair.west


def test_the_kernel_answers_by_itself(here: Path, west: Mount) -> None:
    (here / "directory").mkdir()
    (here / "directory" / "file").write_bytes(b"text")
    cached(west, lambda: os.stat(here / "directory" / "file"))
    cached(west, lambda: exists(here / "directory" / "absent"))


def test_a_change_elsewhere_is_seen_at_once(here: Path, there: Path, west: Mount) -> None:
    file = here / "file"
    file.touch()
    for mode in range(0o600, 0o603):
        cached(west, lambda: os.stat(file))
        (there / "file").chmod(mode)
        assert file.stat().st_mode & 0o777 == mode


def test_an_open_file_sees_a_change_elsewhere_at_once(here: Path, there: Path, west: Mount) -> None:
    with (here / "file").open("wb") as file:
        file.write(b"one")
    with (here / "file").open("rb") as file:
        for size in range(4, 7):
            cached(west, lambda: os.fstat(file.fileno()))
            (there / "file").write_bytes(b"x" * size)
            assert os.fstat(file.fileno()).st_size == size
            assert os.pread(file.fileno(), 100, 0) == b"x" * size


def test_a_name_that_was_absent_appears_at_once(here: Path, there: Path, west: Mount) -> None:
    for name in NAMES[:3]:
        cached(west, lambda: exists(here / name))  # noqa: B023  (called at once)
        (there / name).touch()
        assert exists(here / name)


def test_a_name_that_was_there_disappears_at_once(here: Path, there: Path, west: Mount) -> None:
    for name in NAMES[:3]:
        (here / name).touch()
        cached(west, lambda: exists(here / name))  # noqa: B023  (called at once)
        (there / name).unlink()
        assert not exists(here / name)


def test_a_replaced_file_is_another_at_once(here: Path, there: Path, west: Mount) -> None:
    (here / "file").write_bytes(b"0")
    for number in range(1, 4):
        cached(west, lambda: os.stat(here / "file"))
        (there / "new").write_bytes(b"%d" % number)
        os.rename(there / "new", there / "file")
        assert (here / "file").read_bytes() == b"%d" % number


def test_a_moved_entry_is_not_kept_for_longer_than_its_new_directory(here: Path, there: Path, west: Mount) -> None:
    """The kernel moves an entry together with the time that it was given in the old directory."""
    for place in ("old", "new"):
        (here / place).mkdir()
    for number in range(3):
        source, target = here / "old" / f"{number}", here / "new" / f"{number}"
        source.touch()
        cached(west, lambda: os.stat(source))  # noqa: B023  (called at once)
        (there / "new" / f"other{number}").touch()  # recalls the new directory
        source.rename(target)
        (there / "new" / f"{number}").unlink()
        assert not exists(target)


def test_one_more_name_has_the_newest_attributes(here: Path, there: Path, west: Mount) -> None:
    (here / "one").touch()
    cached(west, lambda: os.stat(here / "one"))
    os.link(here / "one", here / "two")
    assert (here / "one").stat().st_nlink == 2
    (there / "two").chmod(0o611)
    assert (here / "one").stat().st_mode & 0o777 == 0o611
    (there / "one").unlink()
    assert (here / "two").stat().st_nlink == 1


def test_times_of_a_directory_are_those_of_its_last_change(here: Path, there: Path, west: Mount) -> None:
    for number in range(4):
        cached(west, lambda: os.stat(here))
        before = here.stat().st_mtime_ns
        ((here, there)[number % 2] / f"{number}").touch()
        assert here.stat().st_mtime_ns > before
        assert here.stat().st_mtime_ns == there.stat().st_mtime_ns


def test_subdirectories_are_counted_at_once(here: Path, there: Path, west: Mount) -> None:
    for number in range(3):
        cached(west, lambda: os.stat(here))
        (there / f"{number}").mkdir()
        assert here.stat().st_nlink == 3 + number


@pytest.fixture
def mounted_below(here: Path) -> Iterator[Path]:
    """A tmpfs on a directory of ours."""
    below = here / "outer" / "below"
    below.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(below)], check=True, timeout=60)
    try:
        yield below
    finally:
        subprocess.run(["umount", str(below)], check=True, timeout=60)


def test_a_recall_leaves_mounts_below_alone(mounted_below: Path, here: Path, there: Path, west: Mount) -> None:
    (mounted_below / "file").touch()
    cached(west, lambda: os.stat(here / "outer"))
    (there / "new").touch()
    (there / "outer" / "new").touch()
    assert exists(here / "outer" / "new")
    assert (mounted_below / "file").exists()
    assert os.path.ismount(mounted_below)
