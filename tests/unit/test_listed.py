"""READDIRPLUS of a listing that is older than what is known by now, without a kernel."""

from __future__ import annotations

import stat

import pytest
import trio

from apollofs.fs.attributes import Attributes
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.operations_wire import InterceptedOperations
from apollofs.fs.wire_constants import Opcode
from apollofs.fs.wire_replies import DirectoryReply
from apollofs.fs.wire_structs import ReadDirectoryRequest, Request
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, RenameFlag, SetAttr
from tests.support.filesystems import ROOT, Pair
from tests.support.kernels import Kernel, attach

LISTER = 41
"""A thread."""
REGULAR = stat.S_IFREG | 0o644


@pytest.fixture
async def fs(pair: Pair) -> Filesystem:
    """One whose kernel may keep what it is told."""
    attach(pair.here.kernel, Kernel())
    await trio.lowlevel.checkpoint()
    return pair.here


async def _entry(fs: Filesystem, directory: int, name: bytes) -> DirectoryEntry:
    found = await fs.readdir(fs.opendir(directory).fh, 0, 100)
    (entry,) = (entry for _, entry in found if entry.name == name)
    return entry


async def _directory(fs: Filesystem, name: bytes, parent: int = ROOT_INO) -> Attributes:
    return await fs.mkdir(parent, name, 0o755, ROOT)


async def _take(fs: Filesystem, directory: int, name: bytes) -> None:
    """Hold what the attributes of the inode are in."""
    with trio.fail_after(20):
        while not (await fs.lookup(directory, name)).attr_timeout_s:
            pass


async def test_what_is_still_so_is_given_for_the_time_of_the_lease(fs: Filesystem) -> None:
    d = await _directory(fs, b"d")
    sub = await _directory(fs, b"sub", d.ino)
    made = await fs.mknod(d.ino, b"f", REGULAR, 0, ROOT)
    for name, ino in ((b"sub", sub.ino), (b"f", made.ino)):
        given = fs.listed(d.ino, await _entry(fs, d.ino, name))
        assert given is not None
        assert given.ino == ino
        assert given.entry_timeout_s > 0
        assert given.attr_timeout_s > 0


async def test_a_name_that_was_taken_away_is_only_a_name(fs: Filesystem) -> None:
    d, e = await _directory(fs, b"d"), await _directory(fs, b"e")
    await _directory(fs, b"sub", d.ino)
    await fs.mknod(d.ino, b"f", REGULAR, 0, ROOT)
    entries = [await _entry(fs, d.ino, name) for name in (b"sub", b"f")]
    for entry in entries:
        await fs.rename(d.ino, entry.name, e.ino, entry.name, RenameFlag(0))
        assert fs.listed(d.ino, entry) is None


async def test_so_is_one_that_means_something_else(fs: Filesystem) -> None:
    d, e = await _directory(fs, b"d"), await _directory(fs, b"e")
    await _directory(fs, b"sub", d.ino)
    entry = await _entry(fs, d.ino, b"sub")
    await fs.rename(d.ino, b"sub", e.ino, b"sub", RenameFlag(0))
    again = await _directory(fs, b"sub", d.ino)
    assert fs.listed(d.ino, entry) is None
    given = fs.listed(d.ino, await _entry(fs, d.ino, b"sub"))
    assert given is not None
    assert given.ino == again.ino


async def test_a_name_of_a_file_that_has_others_is_no_different(fs: Filesystem) -> None:
    d = await _directory(fs, b"d")
    kept = await fs.mknod(ROOT_INO, b"kept", REGULAR, 0, ROOT)
    await fs.link(kept.ino, d.ino, b"f")
    entry = await _entry(fs, d.ino, b"f")
    await fs.unlink(d.ino, b"f")
    await _take(fs, ROOT_INO, b"kept")
    assert fs.listed(d.ino, entry) is None


async def test_attributes_are_those_of_now(fs: Filesystem, pair: Pair) -> None:
    """Until they are in the store, a file's creation and its changes have one revision."""
    d = await _directory(fs, b"d")
    await pair.volume.settle()
    made = await fs.mknod(d.ino, b"f", REGULAR, 0, ROOT)
    entry = await _entry(fs, d.ino, b"f")
    await fs.setattr(made.ino, SetAttr(mode=0o600, mtime_ns=1))
    await pair.volume.settle()
    given = fs.listed(d.ino, entry)
    assert given is not None
    assert (stat.S_IMODE(given.mode), given.mtime_ns) == (0o600, 1)


async def test_another_mounts_change_counts_as_soon_as_it_is_known(fs: Filesystem, pair: Pair) -> None:
    d, e = await _directory(pair.there, b"d"), await _directory(pair.there, b"e")
    await _directory(pair.there, b"sub", d.ino)
    entry = await _entry(fs, d.ino, b"sub")
    await pair.there.rename(d.ino, b"sub", e.ino, b"sub", RenameFlag(0))
    with trio.fail_after(20):
        while not pair.volume.knows_all(d.ino):
            await fs.readdir(fs.opendir(d.ino).fh, 0, 100)
    await _take(fs, e.ino, b"sub")
    assert fs.listed(d.ino, entry) is None


async def test_who_was_listed_a_directory_was_told_of_it(fs: Filesystem) -> None:
    """As by GETATTR: if his reply comes late, it must not bring back what was before a change."""
    kernel = Kernel()
    attach(fs.kernel, kernel)
    d = await _directory(fs, b"d")
    sub = await _directory(fs, b"sub", d.ino)
    operations = InterceptedOperations(fs)
    request = Request(Opcode.READDIRPLUS, 1, d.ino, 0, 0, LISTER)
    fh, _ = operations.open_directory(request)
    for plus in (False, True):
        read = ReadDirectoryRequest(fh, 0, 4096, plus)
        assert operations.read_directory(request, read, DirectoryReply(read)) is None, "nobody need be asked"
        fs.kernel.names_changed(sub.ino, LISTER + 1)
        assert kernel.told == ([("attributes", sub.ino)] if plus else [])
