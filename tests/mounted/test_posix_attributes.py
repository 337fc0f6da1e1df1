"""Modes, owners, times, flags, extended attributes, statfs and ioctl; read on the other mount."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.clients import errno_of, get_flags, set_flags

pytestmark = pytest.mark.mounted

IMMUTABLE, APPEND_ONLY, NODUMP = 0x10, 0x20, 0x40
SECOND = 1_000_000_000
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD, AT_SYMLINK_NOFOLLOW, STATX_BTIME = -100, 0x100, 0x800
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def flagged(path: Path, flags: int) -> Iterator[None]:
    """Flags for the block; afterwards the file can be removed again."""
    set_flags(path, flags)
    try:
        yield
    finally:
        set_flags(path, 0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- owners and modes ------------------------------------------------------------------------------------------------


def test_chmod_and_chown_are_seen_elsewhere(here: Path, there: Path) -> None:
    (here / "file").touch()
    (there / "file").chmod(0o4751)
    os.chown(here / "file", 70000, 4_000_000_000)
    (here / "file").chmod(0o6751)
    found = (there / "file").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (70000, 4_000_000_000, 0o6751)
    os.chown(there / "file", -1, 5)
    found = (here / "file").stat()
    assert (found.st_uid, found.st_gid) == (70000, 5)
    (here / "link").symlink_to("file")
    os.lchown(here / "link", 8, 9)
    assert (os.lstat(there / "link").st_uid, os.stat(there / "link").st_uid) == (8, 70000)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_write_by_another_user_clears_suid(here: Path, there: Path, nobody: Client, size: int) -> None:
    for name, mode in (("by-write", 0o6777), ("by-truncate", 0o6777), ("not-executable-group", 0o2666)):
        (here / name).write_bytes(b"x" * size)
        (here / name).chmod(mode)
    fd = nobody.call(os.open, "by-write", os.O_WRONLY)
    nobody.call(os.write, fd, b"yy")
    nobody.call(os.close, fd)
    nobody.call(os.truncate, "by-truncate", 3)
    assert (mode_of(there / "by-write"), mode_of(there / "by-truncate")) == (0o777, 0o777)
    assert (there / "by-write").read_bytes() == b"yy" + b"x" * (size - 2)


def test_a_write_by_root_keeps_suid(here: Path, there: Path) -> None:
    (here / "file").touch()
    (here / "file").chmod(0o6755)
    (there / "file").write_bytes(b"root may")
    assert mode_of(here / "file") == 0o6755


def test_chown_clears_suid(here: Path, there: Path, nobody: Client) -> None:
    nobody.call(Path.touch, Path("file"))
    nobody.call(os.chmod, "file", 0o6755)
    nobody.call(os.chown, "file", -1, 65534)
    assert mode_of(there / "file") == 0o755


def test_setgid_directories_hand_on_their_group(here: Path, there: Path, nobody: Client) -> None:
    (here / "shared").mkdir()
    os.chown(here / "shared", 0, 4321)
    (here / "shared").chmod(0o2777)
    (there / "shared" / "file").touch()
    (there / "shared" / "below").mkdir()
    (there / "shared" / "link").symlink_to("x")
    assert {os.lstat(here / "shared" / name).st_gid for name in ("file", "below", "link")} == {4321}
    assert mode_of(here / "shared" / "below") & stat.S_ISGID
    assert not mode_of(here / "shared" / "file") & stat.S_ISGID
    nobody.call(Path.touch, Path("shared/nobodys"))
    assert (there / "shared" / "nobodys").stat().st_gid == 4321
    # a group that is not the caller's: the bit may not be given
    nobody.call(os.chmod, "shared/nobodys", 0o2755)
    assert mode_of(there / "shared" / "nobodys") == 0o755


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, -1, -SECOND - 1, -3 * 10**17, 2**33 * SECOND + 123_456_789])
def test_times_of_any_year(here: Path, there: Path, when: int) -> None:
    (here / "file").touch()
    os.utime(here / "file", ns=(when, when + 5))
    found = (there / "file").stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (when, when + 5)


@pytest.mark.parametrize("year_s", [-8_520_336_000, -11_644_473_600, 10**11], ids=["1700", "1601", "5138"])
@pytest.mark.parametrize("what", ["file", "open", "directory"])
def test_a_time_that_can_not_be_stored_becomes_the_nearest_that_can(
    here: Path, there: Path, year_s: int, what: str
) -> None:
    path = here / what
    with contextlib.ExitStack() as stack:
        if what == "directory":
            path.mkdir()
        else:
            file = stack.enter_context(path.open("wb"))
            file.write(b"x" * 100_000)
            if what == "file":
                file.close()
        os.utime(path, (year_s, year_s))
        (here / "other").touch()
    found = (there / what).stat()
    nearest = -(1 << 62) if year_s < 0 else (1 << 63) - 1
    assert (found.st_atime_ns, found.st_mtime_ns) == (nearest, nearest)


def test_utime_now_and_omit(here: Path, there: Path) -> None:
    (here / "file").touch()
    os.utime(here / "file", ns=(5 * SECOND, 6 * SECOND))
    before = (there / "file").stat()

    def utimens(atime_ns: int, mtime_ns: int) -> None:
        times = struct.pack("4l", 0, atime_ns, 0, mtime_ns)
        checked(LIBC.utimensat(AT_FDCWD, os.fsencode(there / "file"), times, 0))

    utimens(UTIME_OMIT, UTIME_NOW)
    found = (here / "file").stat()
    assert found.st_atime_ns == 5 * SECOND
    assert found.st_mtime_ns >= before.st_ctime_ns
    utimens(UTIME_NOW, UTIME_OMIT)
    assert (here / "file").stat().st_mtime_ns == found.st_mtime_ns
    assert (here / "file").stat().st_atime_ns >= before.st_ctime_ns
    unchanged = (here / "file").stat()
    utimens(UTIME_OMIT, UTIME_OMIT)
    assert (there / "file").stat().st_ctime_ns == unchanged.st_ctime_ns


def test_a_time_that_was_set_stays_over_close(here: Path, there: Path) -> None:
    with (here / "file").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.utime(here / "file", ns=(SECOND, 2 * SECOND))
    assert (there / "file").stat().st_mtime_ns == 2 * SECOND


def test_each_change_moves_its_times(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"1")
    os.utime(here / "file", ns=(SECOND, SECOND))
    os.utime(here, ns=(SECOND, SECOND))

    def moved(path: Path) -> bool:
        return path.stat().st_mtime_ns > SECOND

    ctime = (there / "file").stat().st_ctime_ns
    (there / "file").chmod(0o600)
    assert not moved(here / "file")
    assert (here / "file").stat().st_ctime_ns > ctime
    (there / "file").write_bytes(b"2")
    assert moved(here / "file")
    assert not moved(here)
    (there / "new").touch()
    assert moved(here)
    assert (here / "file").stat().st_atime_ns == SECOND


def test_birth_time(here: Path, there: Path) -> None:
    (here / "file").touch()
    made_ns = (here / "file").stat().st_ctime_ns
    (there / "file").write_bytes(b"later")
    os.utime(there / "file", ns=(0, 0))
    found = ctypes.create_string_buffer(256)
    checked(LIBC.statx(AT_FDCWD, os.fsencode(there / "file"), AT_SYMLINK_NOFOLLOW, STATX_BTIME, found))
    (mask,) = struct.unpack_from("I", found, 0)
    seconds, nanoseconds = struct.unpack_from("qI", found, 80)
    assert mask & STATX_BTIME
    assert abs(seconds * SECOND + nanoseconds - made_ns) < 10 * SECOND


# -- extended attributes ---------------------------------------------------------------------------------------------


def test_xattrs_are_seen_elsewhere(here: Path, there: Path) -> None:
    (here / "file").touch()
    (here / "directory").mkdir()
    (here / "link").symlink_to("file")
    names = ["user.a", "trusted.b", "security.c", "user." + "n" * 250, "user.b\xe9"]
    for name in names:
        os.setxattr(here / "file", name, name.encode("latin-1") * 3)
    os.setxattr(here / "directory", "user.empty", b"")
    os.setxattr(here / "link", "trusted.on-link", b"\0\xff", follow_symlinks=False)
    assert set(os.listxattr(there / "file")) == set(names)
    assert os.getxattr(there / "file", "security.c") == b"security.c" * 3
    assert os.getxattr(there / "directory", "user.empty") == b""
    assert os.listxattr(there / "link", follow_symlinks=False) == ["trusted.on-link"]
    os.removexattr(there / "file", "user.a")
    assert errno_of(os.getxattr, here / "file", "user.a") == errno.ENODATA
    assert errno_of(os.removexattr, here / "file", "user.a") == errno.ENODATA
    (here / "file").rename(here / "moved")
    os.link(here / "moved", here / "linked")
    assert os.getxattr(there / "linked", "trusted.b") == b"trusted.b" * 3


def test_xattr_flags_and_limits(here: Path, there: Path) -> None:
    path, other = here / "file", there / "file"
    path.touch()
    assert errno_of(os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE) == errno.ENODATA
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    assert errno_of(os.setxattr, other, "user.a", b"2", os.XATTR_CREATE) == errno.EEXIST
    os.setxattr(other, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"
    assert errno_of(os.setxattr, path, "user.a", b"", 8) == errno.EINVAL
    os.setxattr(path, "user.large", b"v" * 65536)
    assert os.getxattr(other, "user.large") == b"v" * 65536
    assert errno_of(os.setxattr, path, "user.x", b"v" * 65537) in (errno.E2BIG, errno.ERANGE)
    assert errno_of(os.setxattr, path, "user." + "n" * 251, b"") == errno.ERANGE
    size = LIBC.getxattr(os.fsencode(path), b"user.large", None, 0)
    assert size == 65536
    small = ctypes.create_string_buffer(10)
    assert LIBC.getxattr(os.fsencode(path), b"user.large", small, 10) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_xattr_namespaces(here: Path, nobody: Client) -> None:
    (here / "file").touch()
    # a capability that the kernel accepts: version 2, CAP_NET_RAW
    capability = struct.pack("<5I", 0x02000000, 1 << 13, 0, 0, 0)
    acl = struct.pack("<IHHIHHIHHI", 2, 1, 7, 0xFFFFFFFF, 4, 5, 0xFFFFFFFF, 32, 5, 0xFFFFFFFF)
    for name, value in [("security.capability", capability), ("system.posix_acl_access", acl), ("unknown.name", b"x")]:
        assert errno_of(os.setxattr, here / "file", name, value) == errno.EOPNOTSUPP, name
    assert nobody.call(errno_of, os.setxattr, "file", "user.a", b"") == errno.EACCES
    (here / "file").chmod(0o666)
    nobody.call(os.setxattr, "file", "user.a", b"")
    assert nobody.call(errno_of, os.setxattr, "file", "trusted.a", b"") == errno.EPERM


def test_an_inode_has_at_most_256_xattrs(here: Path, there: Path) -> None:
    (here / "file").touch()
    for number in range(256):
        os.setxattr(here / "file", f"user.{number:03}", b"%d" % number)
    assert errno_of(os.setxattr, there / "file", "user.more", b"") == errno.ENOSPC
    assert len(os.listxattr(there / "file")) == 256


# -- flags and ioctl -------------------------------------------------------------------------------------------------


def test_an_immutable_file(here: Path, there: Path) -> None:
    path = there / "file"
    (here / "file").write_bytes(b"kept")
    with flagged(here / "file", IMMUTABLE):
        assert get_flags(path) == IMMUTABLE
        calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (os.open, (path, os.O_WRONLY)),
            (os.truncate, (path, 0)),
            (os.unlink, (path,)),
            (os.rename, (path, there / "x")),
            (os.link, (path, there / "x")),
            (os.chmod, (path, 0o600)),
            (os.chown, (path, 1, 1)),
            (os.setxattr, (path, "user.a", b"")),
            (os.utime, (path, (1, 1))),
        ]
        for call, arguments in calls:
            assert errno_of(call, *arguments) == errno.EPERM, call
    (there / "file").unlink()


def test_an_immutable_directory(here: Path, there: Path) -> None:
    (here / "directory").mkdir()
    (here / "directory" / "file").touch()
    with flagged(there / "directory", IMMUTABLE):
        assert errno_of(Path.touch, here / "directory" / "new") == errno.EPERM
        assert errno_of(os.unlink, here / "directory" / "file") == errno.EPERM
        assert errno_of(os.rmdir, here / "directory") in (errno.EPERM, errno.ENOTEMPTY)
        (here / "directory" / "file").write_bytes(b"its files are not")
    (here / "directory" / "new").touch()


def test_an_append_only_file(here: Path, there: Path) -> None:
    path = there / "file"
    (here / "file").write_bytes(b"one ")
    with flagged(here / "file", APPEND_ONLY):
        assert errno_of(os.open, path, os.O_WRONLY) == errno.EPERM
        assert errno_of(os.open, path, os.O_WRONLY | os.O_APPEND | os.O_TRUNC) == errno.EPERM
        assert errno_of(os.truncate, path, 0) == errno.EPERM
        assert errno_of(os.unlink, path) == errno.EPERM
        with path.open("ab") as file:
            file.write(b"two")
    assert (here / "file").read_bytes() == b"one two"


def test_what_ioctl_refuses(here: Path, nobody: Client) -> None:
    (here / "file").touch()
    nobody.call(Path.touch, Path("own"))
    assert errno_of(set_flags, here / "file", NODUMP | 0x4000) == errno.EOPNOTSUPP
    assert nobody.call(errno_of, set_flags, Path("own"), IMMUTABLE) == errno.EPERM
    fd = os.open(here / "file", os.O_RDWR)
    try:
        for command in (0x5401, 0x80086603, 0x12345678):
            assert errno_of(fcntl.ioctl, fd, command, bytes(64)) == errno.ENOTTY
    finally:
        os.close(fd)


def test_statfs_counts(here: Path, there: Path) -> None:
    before = os.statvfs(there)
    (here / "file").write_bytes(os.urandom(4 << 20))
    here_now = os.statvfs(here)
    assert (here_now.f_namemax, here_now.f_bsize > 0, here_now.f_blocks > here_now.f_bfree) == (255, True, True)
    assert before.f_bsize == here_now.f_bsize
    assert here_now.f_files > 0
