"""Reading /proc/self/mountinfo, and what is checked before a mount."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apollofs.fs.mount_checks import check_cache_dir, check_fuse_device, check_mountpoint
from apollofs.fs.mountinfo import MountEntry, absolute, mount_at, mount_of, parse_line, place_of, read_mounts
from apollofs.fs.user_error import UserError

LINES = b"""\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:50 / /mnt/a\\040b rw,nosuid - fuse.apollofs apollofs:vol rw,user_id=0
41 22 0:50 /sub /mnt/bind rw,nosuid shared:3 master:1 - fuse.apollofs apollofs:vol rw
42 40 0:51 / /mnt/a\\040b/in rw - tmpfs none rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> list[MountEntry]:
    (tmp_path / "mountinfo").write_bytes(LINES)
    return read_mounts(str(tmp_path / "mountinfo"))


def test_fields(mounts: list[MountEntry]) -> None:
    assert mounts[1] == MountEntry("0:50", "/", "/mnt/a b", "fuse.apollofs", "apollofs:vol")
    assert mounts[2].root == "/sub"
    assert mounts[1].is_apollofs
    assert mounts[1].volume == "vol"
    assert not mounts[0].is_apollofs


def test_names_of_any_bytes() -> None:
    entry = parse_line(b"1 1 0:1 / /\xff\\134x rw - tmpfs none rw")
    assert os.fsencode(entry.mountpoint) == b"/\xff\\x"


def test_where_a_path_lies(mounts: list[MountEntry]) -> None:
    assert mount_of("/mnt/a b/file", mounts) == mounts[1]
    assert mount_of("/mnt/a b/in/file", mounts) == mounts[3]
    assert mount_of("/mnt/a bc", mounts) == mounts[0]
    assert mount_at("/mnt/bind", mounts) == mounts[2]
    assert mount_at("/mnt", mounts) is None


def test_a_place_where_a_filesystem_is_on_top(mounts: list[MountEntry]) -> None:
    assert place_of("0:50", mounts) == "/mnt/a b"
    over = MountEntry("0:52", "/", "/mnt/a b", "tmpfs", "none")
    assert place_of("0:50", [*mounts, over]) == "/mnt/bind"
    assert place_of("0:53", mounts) is None


def test_absolute_never_follows_the_last_component(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert absolute(str(tmp_path / "link")) == str(tmp_path / "link")
    assert absolute(str(tmp_path / "link" / "x")) == str(tmp_path / "real" / "x")
    assert absolute("/") == "/"


def test_mountpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert check_mountpoint(str(tmp_path)) == str(tmp_path)
    assert check_mountpoint(str(tmp_path / "link")) == str(tmp_path)
    for name, why in (("missing", "does not exist"), ("file", "is not a directory")):
        with pytest.raises(UserError, match=why):
            check_mountpoint(str(tmp_path / name))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b")
    os.mkdir(odd)
    (tmp_path / "to odd").symlink_to(odd)
    for path in (odd, str(tmp_path / "to odd")):
        with pytest.raises(UserError, match=r"/\\xff\\x1b is no UTF-8"):
            check_mountpoint(path)
    with pytest.raises(UserError, match="is no UTF-8"):
        check_cache_dir(odd)
    with pytest.raises(UserError, match="is busy: proc is mounted there"):
        check_mountpoint("/proc")


def test_cache_directories(tmp_path: Path) -> None:
    made = tmp_path / "deep" / "cache"
    assert check_cache_dir(str(made)) == str(made)
    assert list(made.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        check_cache_dir(str(tmp_path / "file" / "cache"))


def test_the_fuse_device(tmp_path: Path) -> None:
    check_fuse_device(os.devnull)
    with pytest.raises(UserError, match="is missing"):
        check_fuse_device(str(tmp_path / "fuse"))
    (tmp_path / "fuse").touch()
    with pytest.raises(UserError, match="is no device"):
        check_fuse_device(str(tmp_path / "fuse"))
