"""Numbered listings, and directory handles whose listing the kernel keeps, without a kernel."""

from __future__ import annotations

import pytest

from apollofs.fs import listings
from apollofs.fs.attributes import Attributes
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.listings import NAMES_MAX, Listings
from apollofs.metadata.records import ROOT_INO
from tests.support.filesystems import ROOT, Pair
from tests.support.kernels import Kernel

FEW = 5


def test_a_position_is_number_and_index() -> None:
    at = listings.position(7, 12)
    assert listings.split(at) == (7, 12)
    assert listings.split(listings.position(listings.NUMBER_MAX, 1)) == (listings.NUMBER_MAX, 1)
    assert 0 < listings.position(listings.NUMBER_MAX, (1 << 32) - 1) < 1 << 63


def test_old_listings_are_forgotten_first() -> None:
    remembered = Listings()
    first = remembered.add(1, (b"a",))
    second = remembered.add(2, (b"name",) * NAMES_MAX)
    assert remembered.find(first.number) is None
    assert remembered.newest(1) is None
    assert remembered.newest(2) is second


def test_listings_of_empty_directories_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "NAMES_MAX", 100)
    remembered = Listings()
    made = [remembered.add(directory, ()) for directory in range(1, 200)]
    assert sum(remembered.newest(listing.directory) is not None for listing in made) == 100
    assert sum(remembered.find(listing.number) is not None for listing in made) == 100


async def _begin(fs: Filesystem, kernel: Kernel) -> Attributes:
    fs.kernel.attach(kernel, lambda _: True, lambda: False)
    made = await fs.mkdir(ROOT_INO, b"d", 0o755, ROOT)
    for number in range(FEW):
        await fs.mknod(made.ino, b"%d" % number, 0o100644, 0, ROOT)
    return made


async def _names(fs: Filesystem, fh: int, at: int = 0) -> list[bytes]:
    names: list[bytes] = []
    while found := await fs.readdir(fh, at, 3):
        names += [entry.name for _, entry in found]
        at = found[-1][0]
    return names


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


async def test_a_listing_is_kept_until_somebody_else_changes_it(pair: Pair, kernel: Kernel) -> None:
    made = await _begin(pair.here, kernel)
    first = pair.here.opendir(made.ino)
    assert first.cache
    assert not first.keep
    assert len(await _names(pair.here, first.fh)) == FEW + 2
    assert pair.here.opendir(made.ino).keep
    await pair.there.mknod(made.ino, b"new", 0o100644, 0, ROOT)
    assert ("pages", made.ino) in kernel.told
    assert not pair.here.opendir(made.ino).keep


async def test_who_was_told_before_a_recall_leaves_nothing_in_the_kernel(pair: Pair, kernel: Kernel) -> None:
    made = await _begin(pair.here, kernel)
    fh = pair.here.opendir(made.ino).fh
    found = await pair.here.readdir(fh, 0, 100)
    await pair.there.mknod(made.ino, b"new", 0o100644, 0, ROOT)
    kernel.told.clear()
    assert await pair.here.readdir(fh, found[-1][0], 100) == []
    assert ("pages", made.ino) in kernel.told, "before the kernel takes its listing for complete"


async def test_a_handle_goes_on_after_the_name_that_the_kernel_has_shown(pair: Pair, kernel: Kernel) -> None:
    made = await _begin(pair.here, kernel)
    filling = await pair.here.readdir(pair.here.opendir(made.ino).fh, 0, 100)
    reading = pair.here.opendir(made.ino)
    assert reading.keep
    after, third = filling[4]
    await pair.there.unlink(made.ino, b"0")
    assert third.name == b"2"
    assert await _names(pair.here, reading.fh, after) == [b"3", b"4"]


async def test_without_a_kernel_nothing_is_kept(pair: Pair) -> None:
    fh = pair.here.opendir(ROOT_INO)
    assert not fh.cache
    assert await _names(pair.here, fh.fh) == [b".", b".."]
