"""Changes that fail after they were applied here: the kernel keeps nothing from before. Without a kernel."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import DeadlineExceeded, NoSuchEntry
from apollofs.metadata.records import ROOT_INO, RenameFlag
from tests.support.filesystems import LARGE, ROOT, Pair, close
from tests.support.kernels import Kernel, attach


@dataclass
class Place:
    """A directory that is held, and a file in it whose attributes the kernel has."""

    fs: Filesystem
    kernel: Kernel
    directory: int
    ino: int
    fh: int


@pytest.fixture
async def place(pair: Pair) -> Place:
    fs, kernel = pair.here, Kernel()
    attach(fs.kernel, kernel)
    directory = await fs.mkdir(ROOT_INO, b"d", 0o755, ROOT)
    attributes, opened = await fs.create(directory.ino, b"f", 0o644, os.O_RDWR, ROOT)
    await fs.write(opened.fh, 0, LARGE)
    await fs.fsync(opened.fh, data_only=False)
    assert (await fs.getattr(attributes.ino)).attr_timeout_s
    kernel.told.clear()
    return Place(fs, kernel, directory.ino, attributes.ino, opened.fh)


def _rename(place: Place) -> Awaitable[None]:
    return place.fs.rename(place.directory, b"f", place.directory, b"g", RenameFlag(0))


async def _link(place: Place) -> None:
    await place.fs.link(place.ino, place.directory, b"g")


def _set_attribute(place: Place) -> Awaitable[None]:
    return place.fs.setxattr(place.ino, b"user.x", b"y", 0)


async def _fail(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise DeadlineExceeded("what was answered before can't be committed")


async def _wait(*_: object) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("ends", [_fail, _wait])
@pytest.mark.parametrize("change", [_rename, _link, _set_attribute])
async def test_the_kernel_keeps_no_attributes_from_before(
    pair: Pair,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Place], Awaitable[None]],
    ends: Callable[..., Awaitable[None]],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pair.volume.delegations.ahead, "settled", ends)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_attempt, change, place)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert ("attributes", place.ino) in place.kernel.told
    await pair.volume.settle()
    await close(place.fs, place.fh)


async def _attempt(change: Callable[[Place], Awaitable[None]], place: Place) -> None:
    with pytest.raises((DeadlineExceeded, trio.Cancelled)) as raised:
        await change(place)
    if isinstance(raised.value, trio.Cancelled):
        raise raised.value


async def test_pages_go_with_where_the_file_may_be(pair: Pair, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = place.fs
    other = await fs.mkdir(ROOT_INO, b"e", 0o755, ROOT)
    await fs.read(place.fh, 0, 100)
    with monkeypatch.context() as patched:
        patched.setattr(pair.volume.delegations.ahead, "settled", _fail)
        with pytest.raises(DeadlineExceeded):
            await fs.rename(place.directory, b"f", other.ino, b"f", RenameFlag(0))
    await pair.volume.settle()
    writing = await pair.there.open((await pair.there.lookup(other.ino, b"f")).ino, os.O_WRONLY, ROOT)
    await pair.there.write(writing.fh, 0, b"new")
    await close(pair.there, writing.fh)
    assert ("pages", place.ino) in place.kernel.told
    await close(fs, place.fh)


async def test_an_error_that_says_that_nothing_has_changed_costs_nothing(place: Place) -> None:
    with pytest.raises(NoSuchEntry):
        await place.fs.rename(place.directory, b"absent", place.directory, b"g", RenameFlag(0))
    assert place.kernel.told == []
    await close(place.fs, place.fh)
