"""Names: any bytes, their limits, links, renames, directories and how they are listed."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.clients import errno_of

pytestmark = pytest.mark.mounted

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100
LIBC = ctypes.CDLL(None, use_errno=True)


def renameat2(source: Path, target: Path, flags: int) -> None:
    if LIBC.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def test_names_of_any_bytes(here: Path, there: Path) -> None:
    base = os.fsencode(here)
    names = {bytes([byte]) for byte in range(1, 256)} - {b"/", b"."}
    names |= {bytes(range(1, 47)), bytes(range(48, 256)), b"\xff" * 255, "é".encode() * 127, b"...", b"-rf", b"a\nb"}
    for name in names:
        os.close(os.open(os.path.join(base, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert set(os.listdir(os.fsencode(there))) == names
    for name in names:
        assert stat.S_ISREG(os.lstat(os.path.join(os.fsencode(there), name)).st_mode)
        os.unlink(os.path.join(os.fsencode(there), name))
    assert os.listdir(here) == []


MAKERS: list[Callable[[Path], object]] = [
    Path.touch,
    Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to("x"),
    lambda path: os.link(path.parent / "file", path),
    lambda path: os.rename(path.parent / "file", path),
    os.stat,
    os.unlink,
    os.rmdir,
]


@pytest.mark.parametrize("call", MAKERS)
def test_a_name_of_256_bytes_is_too_long(here: Path, call: Callable[[Path], object]) -> None:
    (here / "file").touch()
    assert errno_of(call, here / ("n" * 256)) == errno.ENAMETOOLONG


@pytest.mark.parametrize("call", MAKERS)
def test_a_path_through_a_file(here: Path, call: Callable[[Path], object]) -> None:
    (here / "not-a-directory").touch()
    (here / "not-a-directory").parent.joinpath("file").touch()
    path = here / "not-a-directory" / "x"

    def with_file(target: Path) -> object:
        if call in (MAKERS[4], MAKERS[5]):
            return (os.link if call is MAKERS[4] else os.rename)(here / "file", target)
        return call(target)

    assert errno_of(with_file, path) == errno.ENOTDIR


def test_a_path_of_4096_bytes(here: Path) -> None:
    assert errno_of(os.stat, str(here) + "/x" * 2048) == errno.ENAMETOOLONG


def test_symlinks_keep_any_target(here: Path, there: Path) -> None:
    for number, target in enumerate([b"x", b"t" * 4095, b"../..", b"\xff\x01 \n", b"/absolute/\xe9"]):
        path = os.path.join(os.fsencode(here), b"%d" % number)
        os.symlink(target, path)
        other = os.path.join(os.fsencode(there), b"%d" % number)
        assert os.readlink(other) == target
        assert os.lstat(other).st_size == len(target)
        assert stat.S_IMODE(os.lstat(other).st_mode) == 0o777
    assert errno_of(os.symlink, "t" * 4096, here / "long") == errno.ENAMETOOLONG
    assert errno_of(os.readlink, here) == errno.EINVAL


def test_a_loop_of_symlinks(here: Path, there: Path) -> None:
    (here / "one").symlink_to("two")
    (there / "two").symlink_to("one")
    (here / "itself").symlink_to("itself")
    for name in ("one", "two", "itself", "one/below"):
        assert errno_of(os.stat, there / name) == errno.ELOOP
        assert errno_of(os.open, here / name, os.O_RDONLY) == errno.ELOOP
    for depth in range(41):
        (here / f"deep{depth + 1}").symlink_to(f"deep{depth}")
    (here / "deep0").touch()
    assert errno_of(os.stat, there / "deep40") == 0
    assert errno_of(os.stat, there / "deep41") == errno.ELOOP


def test_hard_links_are_one_file(here: Path, there: Path) -> None:
    (here / "one").write_bytes(b"body")
    (there / "directory").mkdir()
    os.link(there / "one", there / "directory" / "two")
    one, two = (here / "one").stat(), (there / "directory" / "two").stat()
    assert (one.st_ino, one.st_nlink) == (two.st_ino, 2)
    with (there / "directory" / "two").open("ab") as file:
        file.write(b" more")
    assert (here / "one").read_bytes() == b"body more"
    (here / "one").unlink()
    assert (there / "directory" / "two").stat().st_nlink == 1
    (here / "directory" / "two").rename(here / "three")
    assert (there / "three").read_bytes() == b"body more"
    assert errno_of(os.link, here / "directory", here / "x") == errno.EPERM


def test_a_hard_link_to_a_symlink_is_to_the_link(here: Path, there: Path) -> None:
    (here / "link").symlink_to("target")
    os.link(here / "link", here / "again", follow_symlinks=False)
    assert os.readlink(there / "again") == "target"
    assert os.lstat(there / "again").st_nlink == 2


def test_special_files(here: Path, there: Path) -> None:
    os.mkfifo(here / "fifo", 0o640)
    os.mknod(here / "character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(here / "block", stat.S_IFBLK | 0o600, os.makedev(259, 4097))
    with socket.socket(socket.AF_UNIX) as listening:
        descriptor = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
        listening.bind(f"/proc/self/fd/{descriptor}/socket")
        os.close(descriptor)
    assert stat.S_ISFIFO((there / "fifo").stat().st_mode)
    assert stat.S_ISCHR((there / "character").stat().st_mode)
    assert (there / "character").stat().st_rdev == os.makedev(1, 3)
    assert (there / "block").stat().st_rdev == os.makedev(259, 4097)
    assert stat.S_ISSOCK((there / "socket").stat().st_mode)


@pytest.mark.parametrize("flags", [0, NOREPLACE, EXCHANGE])
def test_rename_flags(here: Path, there: Path, flags: int) -> None:
    (here / "source").write_bytes(b"source")
    (there / "target").write_bytes(b"target")
    number = errno_of(renameat2, here / "source", here / "target", flags)
    left = {path.name: path.read_bytes() for path in there.iterdir()}
    if flags == NOREPLACE:
        assert (number, left) == (errno.EEXIST, {"source": b"source", "target": b"target"})
    elif flags == EXCHANGE:
        assert (number, left) == (0, {"source": b"target", "target": b"source"})
    else:
        assert (number, left) == (0, {"target": b"source"})


def test_what_rename_refuses(here: Path, there: Path) -> None:
    for name in ("file", "full/inside"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).touch()
    (here / "empty").mkdir()
    (there / "full" / "below").mkdir()
    for source, target, flags, expected in [
        ("file", "empty", 0, errno.EISDIR),
        ("empty", "file", 0, errno.ENOTDIR),
        ("empty", "full", 0, errno.ENOTEMPTY),
        ("full", "full/below/deeper", 0, errno.EINVAL),
        ("missing", "x", 0, errno.ENOENT),
        ("file", "missing", EXCHANGE, errno.ENOENT),
        ("full", "full/below", EXCHANGE, errno.EINVAL),
        ("file", "x", WHITEOUT, errno.EINVAL),
        ("file", "x", 64, errno.EINVAL),
        ("file", "x", NOREPLACE | EXCHANGE, errno.EINVAL),
    ]:
        assert errno_of(renameat2, here / source, here / target, flags) == expected, (source, target, flags)
    (there / "full").rename(there / "empty")
    assert sorted(os.listdir(here / "empty")) == ["below", "inside"]
    (here / "file").rename(here / "file")
    assert (there / "file").exists()


def test_two_names_of_one_file_renamed_onto_each_other_both_stay(here: Path, there: Path) -> None:
    (here / "one").touch()
    os.link(here / "one", here / "two")
    os.rename(here / "one", here / "two")
    assert sorted(os.listdir(there)) == ["one", "two"]


def test_directories_are_counted(here: Path, there: Path) -> None:
    for name in ("a", "b", "c"):
        (here / name).mkdir()
        (there / f"file-{name}").touch()
    assert there.stat().st_nlink == 5
    (there / "a").rename(there / "b" / "a")
    assert (here.stat().st_nlink, (here / "b").stat().st_nlink) == (4, 3)
    assert errno_of(os.rmdir, here / "b") == errno.ENOTEMPTY
    assert errno_of(os.rmdir, here / "file-a") == errno.ENOTDIR
    assert errno_of(os.unlink, here / "c") == errno.EISDIR
    (here / "b" / "a").rmdir()
    (there / "b").rmdir()
    assert here.stat().st_nlink == 3


def test_nothing_is_made_in_a_directory_that_was_removed(here: Path, there: Path) -> None:
    (here / "gone").mkdir()
    descriptor = os.open(here / "gone", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (there / "gone").rmdir()
        with pytest.raises(FileNotFoundError):
            os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor)
        assert os.listdir(descriptor) == []
    finally:
        os.close(descriptor)


def test_a_sticky_directory(here: Path, there: Path, nobody: Client) -> None:
    (here / "sticky").mkdir()
    (here / "sticky").chmod(0o1777)
    (here / "sticky" / "root's").touch()
    nobody.call(Path.touch, Path("sticky/nobody's"))
    assert nobody.call(errno_of, os.unlink, "sticky/root's") == errno.EPERM
    assert nobody.call(errno_of, os.rename, "sticky/root's", "sticky/mine") == errno.EPERM
    nobody.call(os.unlink, "sticky/nobody's")
    assert os.listdir(there / "sticky") == ["root's"]


def test_permissions_hold(here: Path, there: Path, nobody: Client) -> None:
    (here / "closed").mkdir(0o700)
    (there / "closed" / "file").touch()
    (there / "secret").write_bytes(b"s")
    (there / "secret").chmod(0o600)
    refused: list[tuple[Callable[..., object], str]]
    refused = [(os.listdir, "closed"), (os.stat, "closed/file"), (os.chdir, "closed")]
    for call, path in refused:
        assert nobody.call(errno_of, call, path) == errno.EACCES
    assert nobody.call(errno_of, os.open, "secret", os.O_RDONLY) == errno.EACCES
    assert nobody.call(errno_of, os.chmod, "secret", 0o777) == errno.EPERM
    assert nobody.call(os.access, "secret", os.R_OK) is False
    (there / "secret").chmod(0o604)
    assert nobody.call(os.access, "secret", os.R_OK) is True


# -- listing ---------------------------------------------------------------------------------------------------------


class Listing:
    """opendir(3) and what goes with it."""

    def __init__(self, path: Path) -> None:
        LIBC.opendir.restype = ctypes.c_void_p
        LIBC.readdir.restype = ctypes.c_void_p
        self._stream = ctypes.c_void_p(LIBC.opendir(os.fsencode(path)))
        assert self._stream.value

    def next(self) -> bytes:
        """A name, or nothing at the end."""
        entry = LIBC.readdir(self._stream)
        return ctypes.string_at(entry + 19) if entry else b""

    def rest(self) -> list[bytes]:
        return list(iter(self.next, b""))

    def tell(self) -> int:
        LIBC.telldir.restype = ctypes.c_long
        return int(LIBC.telldir(self._stream))

    def seek(self, position: int) -> None:
        LIBC.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        LIBC.rewinddir(self._stream)

    def close(self) -> None:
        LIBC.closedir(self._stream)


def test_seekdir_comes_back_to_where_telldir_was(here: Path, there: Path) -> None:
    for number in range(120):
        (here / f"name{number:03}").touch()
    listing = Listing(there)
    seen = []
    places = []
    for _ in range(122):
        places.append(listing.tell())
        seen.append(listing.next())
    assert listing.next() == b""
    assert sorted(seen) == sorted([b".", b"..", *(b"name%03d" % number for number in range(120))])
    for index in (0, 1, 2, 3, 60, 119, 121, 7):
        listing.seek(places[index])
        assert listing.next() == seen[index]
    listing.seek(places[100])
    assert listing.rest() == seen[100:]
    listing.close()


def test_rewinddir_shows_the_newest_names(here: Path, there: Path) -> None:
    (here / "old").touch()
    listing = Listing(there)
    assert sorted(listing.rest()) == [b".", b"..", b"old"]
    (here / "new").touch()
    (here / "old").unlink()
    listing.rewind()
    assert sorted(listing.rest()) == [b".", b"..", b"new"]
    listing.close()


def test_a_listing_tells_types_and_numbers(here: Path, there: Path) -> None:
    (here / "file").touch()
    (here / "directory").mkdir()
    (here / "link").symlink_to("x")
    os.mkfifo(here / "fifo")
    with os.scandir(there) as entries:
        found = {entry.name: entry for entry in entries}
    assert [name for name in found if found[name].is_dir(follow_symlinks=False)] == ["directory"]
    assert [name for name in found if found[name].is_symlink()] == ["link"]
    assert [name for name in found if found[name].is_file(follow_symlinks=False)] == ["file"]
    assert {name: os.lstat(here / name).st_ino for name in found} == {name: found[name].inode() for name in found}


def test_removing_while_listing_removes_all(here: Path, there: Path) -> None:
    for number in range(1100):
        # more than a page of the metadata layer
        os.mkdir(here / f"{number}") if number % 50 == 0 else os.symlink("x", here / f"{number}")
    with os.scandir(there) as entries:
        for entry in entries:
            (os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink)(entry.path)
    assert os.listdir(here) == []
