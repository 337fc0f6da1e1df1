"""KernelPages: which pages are kept at an open, and which must go before attributes are replied."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import trio

from apollofs.fs.filesystem import Filesystem
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.kernel_pages import KernelPages
from apollofs.metadata.records import ROOT_INO, RenameFlag
from tests.support.filesystems import LARGE, ROOT, USER, Pair, close, save
from tests.support.kernels import Kernel, attach

VALIDITY_S = 10.0
D = 100
FILE = 7
ONE, TWO = (100, 1), (100, 2)


@dataclass
class Table:
    inos: set[int] = field(default_factory=set)

    def add(self, ino: int) -> None:
        self.inos.add(ino)

    def remove(self, ino: int) -> None:
        self.inos.remove(ino)


@pytest.fixture
def pages() -> KernelPages:
    return KernelPages()


def test_pages_of_the_version_that_is_opened_are_kept(pages: KernelPages) -> None:
    assert not pages.opened(FILE, 1)
    pages.read(FILE, 1, ONE)
    assert pages.opened(FILE, 1)
    assert not pages.opened(FILE, 2)
    assert not pages.outdated(FILE, 2), "the kernel has dropped them at that open"


def test_pages_of_several_versions_are_not_kept(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    pages.read(FILE, 2, TWO)
    assert pages.outdated(FILE, 2)
    assert not pages.opened(FILE, 2)
    pages.read(FILE, 2, TWO)
    assert pages.opened(FILE, 2)


def test_what_was_written_is_read_anew_once(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    pages.written(FILE)
    pages.committed(FILE, 1, 2)
    assert not pages.outdated(FILE, 2)
    assert not pages.opened(FILE, 2)


def test_a_commit_that_met_another_outdates_the_pages(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    pages.committed(FILE, 1, 3)
    assert pages.outdated(FILE, 3)


def test_the_kernel_drops_by_itself_what_size_or_time_tell_of(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    assert not pages.settle(FILE, 2, TWO)
    assert not pages.outdated(FILE, 2)


def test_what_they_do_not_tell_of_is_dropped_first(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    assert pages.settle(FILE, 2, ONE)
    pages.begin_drop(FILE, recalled=False)
    assert pages.outdated(FILE, 2)
    pages.read(FILE, 2, ONE)
    pages.end_drop(FILE, done=True)
    assert not pages.outdated(FILE, 2)
    assert not pages.asks(FILE)


def test_a_drop_that_was_not_done_leaves_them_outdated(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    pages.begin_drop(FILE, recalled=True)
    pages.end_drop(FILE, done=False)
    assert pages.outdated(FILE, 1)
    assert pages.asks(FILE)
    pages.refreshed(FILE, pages.recalls)
    assert not pages.asks(FILE)


def test_a_recall_that_comes_while_the_newest_body_is_looked_for_counts(pages: KernelPages) -> None:
    pages.read(FILE, 1, ONE)
    since = pages.recalls
    pages.begin_drop(FILE, recalled=True)
    pages.end_drop(FILE, done=True)
    pages.refreshed(FILE, since)
    assert pages.asks(FILE)


def test_a_table_is_told_which_files_have_pages() -> None:
    table = Table()
    pages = KernelPages(table)
    pages.read(FILE, 1, ONE)
    pages.written(D)
    assert table.inos == {FILE, D}
    pages.forget(FILE)
    pages.forget(FILE)
    assert table.inos == {D}


async def test_pages_go_with_their_group_even_when_the_attributes_have_run_out() -> None:
    kernel = Kernel()
    left = [VALIDITY_S]
    cache = KernelCache(lambda _: left[0])
    attach(cache, kernel)
    left[0] = 1e-9
    cache.attributes(D, FILE)
    cache.entry(D, b"f")
    cache.reads(FILE, 1, ONE)
    assert cache.holds(D)
    await cache.drop(D)
    assert ("pages", FILE) in kernel.told
    assert not cache.holds(D)


async def test_a_change_elsewhere_drops_the_pages(pair: Pair) -> None:
    kernel = Kernel()
    pair.here.kernel.attach(kernel, lambda _: True, lambda: False)
    ino = await save(pair.there, b"f", LARGE)
    for keep in (False, True):
        for _ in range(3):  # takes the directory
            await pair.here.lookup(ROOT_INO, b"f")
        opened = await pair.here.open(ino, os.O_RDONLY, USER)
        assert opened.keep_cache == keep
        assert await pair.here.read(opened.fh, 0, 100) == LARGE[:100]
        await close(pair.here, opened.fh)
    kernel.told.clear()
    opened = await pair.there.open(ino, os.O_WRONLY, USER)
    await pair.there.write(opened.fh, 0, b"new")
    await close(pair.there, opened.fh)
    assert ("pages", ino) in kernel.told
    opened = await pair.here.open(ino, os.O_RDONLY, USER)
    assert not opened.keep_cache
    assert await pair.here.read(opened.fh, 0, 5) == b"new34"
    await close(pair.here, opened.fh)


async def test_a_listing_gives_no_attributes_for_a_body_that_is_not_read_yet(pair: Pair) -> None:
    """The kernel would not ask for them before it reads what is open here, of the body from before."""
    pair.here.kernel.attach(Kernel(), lambda _: True, lambda: False)
    ino = await save(pair.there, b"f", LARGE)
    await pair.here.lookup(ROOT_INO, b"f")
    reading = await pair.here.open(ino, os.O_RDONLY, USER)
    writing = await pair.there.open(ino, os.O_WRONLY, USER)
    await pair.there.write(writing.fh, 0, b"new")
    await close(pair.there, writing.fh)
    fh = pair.here.opendir(ROOT_INO).fh
    with trio.fail_after(20):
        while not pair.volume.knows_all(ROOT_INO):
            found = await pair.here.readdir(fh, 0, 100)
    (entry,) = (entry for _, entry in found if entry.name == b"f")
    assert pair.here.listed(ROOT_INO, entry) is None
    pair.here.releasedir(fh)
    assert (await pair.here.getattr(ino)).size_bytes == len(LARGE)
    assert await pair.here.read(reading.fh, 0, 5) == b"new34"
    await close(pair.here, reading.fh)


async def _mapped(pair: Pair, kernel: Kernel) -> tuple[int, int, int]:
    """A file, its directory and a handle of it: `here` holds the directory, and the kernel has its pages."""
    attach(pair.here.kernel, kernel)
    directory = await pair.here.mkdir(ROOT_INO, b"d", 0o755, ROOT)
    attributes, opened = await pair.here.create(directory.ino, b"f", 0o644, os.O_RDWR, ROOT)
    await pair.here.write(opened.fh, 0, LARGE)
    await pair.here.fsync(opened.fh, data_only=False)
    await pair.here.getattr(attributes.ino)
    assert await pair.here.read(opened.fh, 0, 100) == LARGE[:100]
    return attributes.ino, directory.ino, opened.fh


async def _overwrite(fs: Filesystem, ino: int) -> None:
    opened = await fs.open(ino, os.O_WRONLY, ROOT)
    await fs.write(opened.fh, 0, b"new")
    await close(fs, opened.fh)


async def test_pages_go_with_the_group_that_the_file_was_moved_to(pair: Pair) -> None:
    kernel = Kernel()
    ino, directory, fh = await _mapped(pair, kernel)
    other = await pair.here.mkdir(ROOT_INO, b"e", 0o755, ROOT)
    await pair.here.rename(directory, b"f", other.ino, b"f", RenameFlag(0))
    assert ("pages", ino) not in kernel.told, "they stay while the new directory is held"
    await pair.there.lookup(other.ino, b"f")
    await _overwrite(pair.there, ino)
    assert ("pages", ino) in kernel.told
    assert await pair.here.read(fh, 0, 5) == b"new34"
    await close(pair.here, fh)


async def test_pages_of_what_is_moved_to_where_nothing_is_held_go_at_once(pair: Pair) -> None:
    kernel = Kernel()
    ino, directory, fh = await _mapped(pair, kernel)
    other = await pair.there.mkdir(ROOT_INO, b"e", 0o755, ROOT)
    await pair.here.rename(directory, b"f", other.ino, b"f", RenameFlag(0))
    assert ("pages", ino) in kernel.told
    await pair.there.lookup(other.ino, b"f")
    await _overwrite(pair.there, ino)
    assert await pair.here.read(fh, 0, 5) == b"new34", "nobody has asked for attributes before it"
    await close(pair.here, fh)


async def test_pages_of_what_gets_another_name_go_at_once(pair: Pair) -> None:
    kernel = Kernel()
    ino, directory, fh = await _mapped(pair, kernel)
    await pair.here.link(ino, directory, b"another")
    assert ("pages", ino) in kernel.told
    await pair.there.lookup(directory, b"f")
    await _overwrite(pair.there, ino)
    assert await pair.here.read(fh, 0, 5) == b"new34"
    await close(pair.here, fh)


async def _read_twice(pair: Pair, fh: int) -> None:
    await pair.here.read(fh, 0, 100)
    assert await pair.here.read(fh, 0, 5) == b"new34"


async def test_the_first_read_of_a_file_is_among_what_a_recall_drops(pair: Pair) -> None:
    kernel, begun, let_go = Kernel(), trio.Event(), trio.Event()
    attach(pair.here.kernel, kernel)
    ino = await save(pair.there, b"f", LARGE)
    with trio.fail_after(20):
        while not (await pair.here.lookup(ROOT_INO, b"f")).attr_timeout_s:
            pass

    async def slowly() -> None:
        begun.set()
        await let_go.wait()

    pair.blobs.before_read = slowly
    fh = (await pair.here.open(ino, os.O_RDONLY, ROOT)).fh
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read_twice, pair, fh)
        await begun.wait()
        await _overwrite(pair.there, ino)
        assert ("pages", ino) in kernel.told
        pair.blobs.before_read = None
        let_go.set()
    await close(pair.here, fh)


async def test_a_mapping_needs_no_attributes_to_be_dropped_with_its_group(pair: Pair) -> None:
    """The last ones that the kernel was told were given before the directory was held."""
    kernel = Kernel()
    attach(pair.here.kernel, kernel)
    ino = await save(pair.there, b"f", LARGE)
    assert not (await pair.here.lookup(ROOT_INO, b"f")).attr_timeout_s
    fh = (await pair.here.open(ino, os.O_RDONLY, ROOT)).fh
    with trio.fail_after(20):
        while not pair.volume.group_of(ino):
            await pair.volume.lookup(ROOT_INO, b"f")
    assert await pair.here.read(fh, 0, 5) == LARGE[:5]
    await _overwrite(pair.there, ino)
    assert ("pages", ino) in kernel.told
    assert await pair.here.read(fh, 0, 5) == b"new34"
    await close(pair.here, fh)
