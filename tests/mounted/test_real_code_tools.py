"""Programs that people use, on two real mounts: git, pip, rsync, tar, cp; what one mount takes in the other gives."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.mount_faults import content

pytestmark = pytest.mark.mounted
DEADLINE_S = 120.0
MIB = 1 << 20
HOLE_BYTES = 8 * MIB
LONG_AGO_NS = 1_600_000_000_123_456_789


def ran(*words: str | Path, cwd: Path | None = None, more: Mapping[str, str] | None = None) -> str:
    """What the program printed; it must end well. `more`: of its environment."""
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **(more or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    return done.stdout


# -- trees ------------------------------------------------------------------------------------------------------------


def grow_tree(top: Path) -> None:
    """Files of many sizes, with everything that archives have to keep."""
    top.mkdir()
    for number, size in enumerate((0, 10, 5000, 200_000, 3 * MIB + 7)):
        directory = top / f"directory {number}"
        directory.mkdir()
        (directory / "file").write_bytes(content(number, size))
    with (top / "sparse").open("wb") as file:
        file.write(content(9, MIB))
        file.truncate(MIB + HOLE_BYTES)
        os.pwrite(file.fileno(), content(10, 5000), MIB + HOLE_BYTES - 5000)
    os.link(top / "sparse", top / "directory 1" / "another name")
    os.symlink("directory 1/file", top / "symlink")
    os.symlink("nowhere", top / "dangling")
    os.mkfifo(top / "fifo", 0o640)
    (top / "directory 2" / "file").chmod(0o4750)
    os.setxattr(top / "directory 3" / "file", "user.colour", b"blue\0green")
    os.setxattr(top / "directory 4", "user.empty", b"")
    for number, path in enumerate(top.rglob("*")):
        os.utime(path, ns=(LONG_AGO_NS + number,) * 2, follow_symlinks=False)


@dataclass(frozen=True)
class Kept:
    """What must be kept of a name. `what`: where a symlink leads, or the digest of a file."""

    mode: int
    mtime_ns: int
    links: int
    is_sparse: bool
    what: str
    xattrs: dict[str, bytes]


def kept(path: Path) -> Kept:
    status, what = path.lstat(), ""
    if path.is_symlink():
        what = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        what = hashlib.sha256(path.read_bytes()).hexdigest()
    links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    is_sparse = status.st_blocks * 512 < status.st_size - HOLE_BYTES // 2
    names = os.listxattr(path, follow_symlinks=False)
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    return Kept(status.st_mode, status.st_mtime_ns, links, is_sparse, what, xattrs)


def facts(top: Path) -> dict[str, Kept]:
    """Of all that is below `top`."""
    return {str(path.relative_to(top)): kept(path) for path in sorted(top.rglob("*"))}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """On a local disk."""
    grow_tree(tmp_path / "tree")
    return tmp_path / "tree"


# -- tar and cp -------------------------------------------------------------------------------------------------------


def test_tar_keeps_everything(here: Path, there: Path, tree: Path) -> None:
    wanted = facts(tree)
    assert wanted["sparse"].is_sparse
    ran("tar", "--format=posix", "--sparse", "--xattrs", "-cf", here / "local.tar", "-C", tree, ".")
    (there / "out").mkdir()
    ran("tar", "--xattrs", "-xpf", there / "local.tar", "-C", there / "out")
    assert facts(here / "out") == wanted
    ran("tar", "--format=posix", "--sparse", "--xattrs", "-czf", there / "again.tar.gz", "-C", here / "out", ".")
    (here / "again").mkdir()
    ran("tar", "--xattrs", "-xpf", here / "again.tar.gz", "-C", here / "again")
    assert facts(there / "again") == wanted


def test_a_tree_that_is_made_here_is_archived_there(here: Path, there: Path, tmp_path: Path) -> None:
    grow_tree(here / "tree")
    wanted = facts(here / "tree")
    assert wanted["sparse"].is_sparse
    assert facts(there / "tree") == wanted
    (tmp_path / "out").mkdir()
    ran(
        "sh",
        "-c",
        f"tar --format=posix --sparse --xattrs -cf - -C {there}/tree . | tar --xattrs -xpf - -C {tmp_path}/out",
    )
    assert facts(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    "options", [("--reflink=auto",), ("--reflink=never", "--sparse=always")], ids=["clone", "copy"]
)
def test_cp(here: Path, there: Path, tree: Path, options: tuple[str, ...]) -> None:
    """From a local disk, inside a mount, and back from the other one."""
    wanted = facts(tree)
    ran("cp", "-a", *options, tree, here / "in")
    assert facts(there / "in") == wanted
    ran("cp", "-a", *options, there / "in", there / "beside")
    assert facts(here / "beside") == wanted
    ran("cp", "-a", *options, here / "beside", tree.with_name("back"))
    assert facts(tree.with_name("back")) == wanted


# -- rsync ------------------------------------------------------------------------------------------------------------


def test_rsync_both_ways(here: Path, there: Path, tree: Path) -> None:
    ran("rsync", "-aHXS", f"{tree}/", f"{here}/in/")
    assert facts(there / "in") == facts(tree)
    differences = ran("rsync", "-aHX", "--checksum", "--dry-run", "--itemize-changes", f"{tree}/", f"{there}/in/")
    assert differences == ""
    (tree / "directory 2" / "file").unlink()
    os.utime(tree / "directory 2", ns=(LONG_AGO_NS + 10**12,) * 2)  # rsync takes times of one second for the same
    (tree / "directory 3" / "file").write_bytes(b"shorter")
    (tree / "new").write_bytes(content(20, MIB))
    ran("rsync", "-aHXS", "--delete", f"{tree}/", f"{there}/in/")
    assert facts(here / "in") == facts(tree)
    ran("rsync", "-aHXS", f"{here}/in/", tree.with_name("back"))
    assert facts(tree.with_name("back")) == facts(tree)


def test_rsync_changes_files_in_place_and_appends(here: Path, there: Path, tmp_path: Path) -> None:
    """What the other mount has open shows it: the file is the same one."""
    source, data = tmp_path / "log", bytearray(content(1, 4 * MIB))
    source.write_bytes(data)
    ran("rsync", "-a", source, here / "log")
    ino = (there / "log").stat().st_ino
    with (there / "log").open("rb", buffering=0) as reading:
        assert reading.read() == data
        data[MIB : MIB + 5] = b"inner"
        source.write_bytes(data)
        ran("rsync", "-a", "--inplace", "--no-whole-file", "--ignore-times", source, here / "log")
        assert (there / "log").read_bytes() == data
        for option in ("--append", "--append-verify"):
            data += content(2, 100_000)
            source.write_bytes(data)
            ran("rsync", "-a", option, source, here / "log")
            assert (there / "log").read_bytes() == data
        assert os.fstat(reading.fileno()).st_size == len(data)
        assert os.pread(reading.fileno(), 5, MIB) == b"inner"
    assert (there / "log").stat().st_ino == (here / "log").stat().st_ino == ino


# -- git --------------------------------------------------------------------------------------------------------------


def git(repository: Path, *words: str | Path) -> str:
    who = {f"GIT_{role}_{what}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    no_config = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return ran("git", *words, cwd=repository, more=who | no_config)


def test_git(here: Path, there: Path) -> None:
    """A repository that both mounts work in, and a clone of it that pushes."""
    git(here, "init", "-q", "-b", "main", "origin")
    for number in range(40):
        (here / "origin" / f"file{number}").write_bytes(content(number, 1 + 997 * number))
    git(here / "origin", "add", ".")
    git(here / "origin", "commit", "-qm", "first")
    git(there / "origin", "checkout", "-qb", "side")
    (there / "origin" / "file3").write_bytes(b"changed on the other mount\n")
    git(there / "origin", "commit", "-qam", "second")
    assert git(here / "origin", "status", "--porcelain") == ""
    assert (here / "origin" / "file3").read_bytes() == b"changed on the other mount\n"

    git(there, "clone", "-q", there / "origin", "clone")
    git(here / "clone", "checkout", "-q", "-b", "pushed")
    (here / "clone" / "more").write_bytes(content(99, 2 * MIB))
    git(here / "clone", "add", ".")
    git(here / "clone", "commit", "-qm", "third")
    git(there / "clone", "push", "-q", "origin", "pushed")

    git(there / "origin", "gc", "-q", "--prune=now")
    git(here / "origin", "checkout", "-q", "pushed")
    assert (there / "origin" / "more").read_bytes() == content(99, 2 * MIB)
    for repository in (there / "origin", here / "clone"):
        git(repository, "fsck", "--strict")
        assert git(repository, "status", "--porcelain") == ""
    assert git(here / "origin", "log", "--format=%s").split() == ["third", "second", "first"]


# -- pip --------------------------------------------------------------------------------------------------------------


def built_wheel(directory: Path) -> Path:
    """A package with a module, data and a command, packed by hand: nothing is fetched."""
    info = "tiny-1.0.dist-info"
    files = {
        "tiny/__init__.py": b"import pkgutil\ndata = pkgutil.get_data(__name__, 'data')\n",
        "tiny/data": content(1, 300_000),
        "tiny/main.py": b"def main():\n    from tiny import data\n    print(len(data))\n",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\ntiny = tiny.main:main\n",
    }
    wheel = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{record(name, data)}\n" for name, data in files.items()))
    return wheel


def record(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def test_pip_installs_into_the_mount(here: Path, there: Path, tmp_path: Path) -> None:
    """pip makes everything in a temporary directory and moves it: both are in the mount."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    wheel = built_wheel(tmp_path)
    for _ in range(2):
        (here / "tmp").mkdir(exist_ok=True)
        more = {"TMPDIR": str(here / "tmp")}
        ran(*pip, "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", here / "site", wheel, more=more)
        assert ran(there / "site" / "bin" / "tiny", more={"PYTHONPATH": str(there / "site")}) == "300000\n"
    assert "tiny" in ran(*pip, "list", "--path", there / "site")
    assert any((there / "site" / "tiny" / "__pycache__").iterdir())
