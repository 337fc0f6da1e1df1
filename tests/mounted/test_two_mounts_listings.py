"""The kernel answers listings from its own cache; what the other mount changes is in the next one all the same."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tests.faults.mount_faults import until
from tests.mounted.client import Client
from tests.mounted.clients import churn, errno_of
from tests.mounted.conftest import Places
from tests.mounted.counting import asked, cached
from tests.mounted.harness import Mount

pytestmark = pytest.mark.mounted

LISTING = ("readdir", "readdirplus")
MANY = 700
"""Names that need several requests to be listed."""
PAGES = 2500
"""Names that etcd is asked for several times."""


@pytest.fixture
def west(places: Places) -> Mount:
    return places.pair.west


def fill(directory: Path, count: int) -> list[str]:
    names = [f"{number:04d}" for number in range(count)]
    for name in names:
        os.mknod(directory / name)
    return names


def test_a_listing_is_answered_by_the_kernel(here: Path, west: Mount) -> None:
    names = fill(here, 30)
    cached(west, lambda: os.listdir(here), LISTING)
    assert sorted(os.listdir(here)) == names


def test_a_large_listing_is_answered_by_the_kernel(here: Path, west: Mount) -> None:
    names = fill(here, MANY)
    cached(west, lambda: os.listdir(here), LISTING)
    assert sorted(os.listdir(here)) == names


def test_attributes_come_with_a_listing_of_several_pages(places: Places) -> None:
    """As ls -l on another mount than the maker's: not a request for each file."""
    names = fill(places.here, PAGES)
    found: list[str] = []

    def list_with_attributes() -> None:
        found.clear()
        found.extend(entry.name for entry in os.scandir(places.there) if entry.stat().st_size == 0)

    # while the directory may not be held, because it was recalled a moment ago, each file is asked for
    until(lambda: asked(places.pair.east, list_with_attributes) < PAGES // 10, "the listing brings the attributes")
    assert sorted(found) == names


def test_a_change_of_its_own_is_in_the_next_listing(here: Path, west: Mount) -> None:
    names = set(fill(here, 5))
    for number in range(3):
        cached(west, lambda: os.listdir(here), LISTING)
        os.mknod(here / f"new{number}")
        names.add(f"new{number}")
        assert set(os.listdir(here)) == names
    cached(west, lambda: os.listdir(here), LISTING)
    os.rename(here / "new0", here / "new3")
    os.unlink(here / "new1")
    assert set(os.listdir(here)) == names - {"new0", "new1"} | {"new3"}


def test_a_change_elsewhere_is_in_the_next_listing(here: Path, there: Path, west: Mount) -> None:
    names = set(fill(here, 5))
    for number in range(4):
        cached(west, lambda: os.listdir(here), LISTING)
        os.mknod(there / f"new{number}")
        names.add(f"new{number}")
        assert set(os.listdir(here)) == names
    cached(west, lambda: os.listdir(here), LISTING)
    os.unlink(there / "new1")
    assert set(os.listdir(here)) == names - {"new1"}


def test_a_change_that_leaves_the_times_is_in_the_next_listing(here: Path, there: Path, west: Mount) -> None:
    """What the kernel would go by, the time of the directory, is put back by who changes it."""
    fill(here, 5)
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(3):
        cached(west, lambda: os.listdir(fd), LISTING)
        before = os.stat(there)
        os.mknod(there / f"new{number}")
        os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert f"new{number}" in os.listdir(fd)
        assert f"new{number}" in os.listdir(here)
    os.close(fd)


def test_an_open_directory_lists_what_was_changed_elsewhere(here: Path, there: Path, west: Mount) -> None:
    fill(here, 5)
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(4):
        cached(west, lambda: os.listdir(fd), LISTING)
        os.mknod(there / f"new{number}")
        assert f"new{number}" in os.listdir(fd)
    os.close(fd)


def test_names_that_stay_are_listed_once_though_the_cache_goes_meanwhile(here: Path, there: Path, west: Mount) -> None:
    """A handle that has read half of its listing from the kernel's cache goes on after the same name."""
    names = fill(here, MANY)
    cached(west, lambda: os.listdir(here), LISTING)
    with os.scandir(here) as entries:
        found = [next(entries).name for _ in range(10)]
        for name in names[:5]:
            os.unlink(there / name)
        os.listdir(here)
        found += [entry.name for entry in entries]
    assert [name for name in found if name in names[5:]] == names[5:]


def test_a_tree_is_removed_while_it_is_listed(here: Path, west: Mount) -> None:
    fill(here, MANY)
    cached(west, lambda: os.listdir(here), LISTING)
    with os.scandir(here) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(here) == []


def test_listings_are_never_behind(here: Path, there: Path, client: Client) -> None:
    """Many rounds, with others that list and change the directory at the same time."""
    churning = client.start(churn, here, 150)
    rng = random.Random(4)
    names: set[str] = set()
    for number in range(200):
        changed, other = rng.sample((here, there), 2)
        if names and rng.random() < 0.4:
            gone = rng.choice(sorted(names))
            os.unlink(changed / gone)
            names.discard(gone)
        else:
            os.mknod(changed / f"n{number}")
            names.add(f"n{number}")
        for directory in (other, changed):
            assert {name for name in os.listdir(directory) if name.startswith("n")} == names
    churning.result()


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_is_moved_away_during_a_listing_is_gone(here: Path, again: bool) -> None:
    """The names that the listing still has to bring are older than the rename."""
    one, other = here / "one", here / "other"
    names = [f"{number:04}" + "x" * 100 for number in range(1200)]
    for directory in (one, other, *(one / name for name in names)):
        directory.mkdir()
    (one / names[-1] / "before").touch()
    with os.scandir(one) as entries:
        for _ in range(10):
            os.stat(next(entries))  # so that the kernel asks for attributes with names
        (one / names[-1]).rename(other / names[-1])
        if again:
            (one / names[-1]).mkdir()
        for entry in entries:
            if entry.name != names[-1]:
                os.stat(entry)
    if again:
        assert os.listdir(one / names[-1]) == []
    else:
        assert errno_of(os.stat, one / names[-1]) == errno.ENOENT
