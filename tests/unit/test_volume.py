"""What the operations on a volume do, seen from a second mount."""

from __future__ import annotations

import stat

import pytest

from apollofs.metadata import errors
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import (
    NOW,
    ROOT_INO,
    BodyChange,
    InodeFlag,
    Owner,
    RenameFlag,
    SetAttr,
)
from apollofs.metadata.store import KeyValue, Range, RangeResult
from apollofs.metadata.view import Recollection
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, Pair

FILE = stat.S_IFREG | 0o644


async def names(volume: Volume, directory: int = ROOT_INO) -> list[bytes]:
    return [entry.name for entry in (await volume.readdir(directory, b"", 1000)).entries]


# -- create -----------------------------------------------------------------------------------------------------------


async def test_created_file_is_seen_by_the_other_mount(volumes: Pair) -> None:
    a, b = volumes
    made = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    found = await b.lookup(ROOT_INO, b"f")
    assert found == made
    assert (found.uid, found.gid, found.nlink, found.size_bytes) == (ME.uid, ME.gid, 1, 0)
    assert found.btime_ns == found.mtime_ns == found.ctime_ns


async def test_create_refuses_an_existing_name(volumes: Pair) -> None:
    a, b = volumes
    await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    with pytest.raises(errors.EntryExists):
        await b.mknod(ROOT_INO, b"f", FILE, 0, ME)
    with pytest.raises(errors.EntryExists):
        await b.mkdir(ROOT_INO, b"f", 0o755, ME)


async def test_create_in_a_removed_directory_fails(volumes: Pair) -> None:
    a, b = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    await b.lookup(ROOT_INO, b"d")
    await a.rmdir(ROOT_INO, b"d")
    with pytest.raises(errors.NoSuchEntry):
        await b.mknod(directory.ino, b"f", FILE, 0, ME)


async def test_setgid_directory_hands_on_its_group(volumes: Pair) -> None:
    a, b = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o2775, Owner(1, 77))
    file = await b.mknod(directory.ino, b"f", FILE, 0, ME)
    sub = await b.mkdir(directory.ino, b"s", 0o755, ME)
    assert file.gid == sub.gid == 77
    assert sub.mode & stat.S_ISGID
    assert not file.mode & stat.S_ISGID


@pytest.mark.parametrize("mode", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
async def test_nodes(volumes: Pair, mode: int) -> None:
    a, b = volumes
    await a.mknod(ROOT_INO, b"n", mode | 0o600, 0x0103, ME)
    found = await b.lookup(ROOT_INO, b"n")
    assert (found.mode, found.rdev) == (mode | 0o600, 0x0103)


async def test_symlink(volumes: Pair) -> None:
    a, b = volumes
    await a.symlink(ROOT_INO, b"s", b"x" * 4095, ME)
    found = await b.lookup(ROOT_INO, b"s")
    assert found.is_symlink
    assert found.target == b"x" * 4095
    assert found.size_bytes == 4095
    with pytest.raises(errors.NameTooLong):
        await a.symlink(ROOT_INO, b"t", b"x" * 4096, ME)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b"])
async def test_names_that_are_none(volumes: Pair, name: bytes) -> None:
    with pytest.raises(errors.InvalidArgument):
        await volumes[0].mknod(ROOT_INO, name, FILE, 0, ME)


async def test_names_of_any_bytes(volumes: Pair) -> None:
    a, b = volumes
    odd = [bytes([byte]) * 255 for byte in range(1, 256) if byte != 0x2F and byte != 0x2E]
    for name in odd:
        await a.mknod(ROOT_INO, name, FILE, 0, ME)
    assert await names(b) == odd
    with pytest.raises(errors.NameTooLong):
        await a.mknod(ROOT_INO, b"x" * 256, FILE, 0, ME)


# -- remove -----------------------------------------------------------------------------------------------------------


async def test_unlink(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    assert (await a.unlink(ROOT_INO, b"f")).nlink == 0
    with pytest.raises(errors.NoSuchEntry):
        await b.lookup(ROOT_INO, b"f")
    with pytest.raises(errors.StaleInode):
        await b.getattr(file.ino)
    with pytest.raises(errors.NoSuchEntry):
        await b.unlink(ROOT_INO, b"f")


async def test_rmdir_wants_an_empty_directory(volumes: Pair) -> None:
    a, b = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    await b.lookup(ROOT_INO, b"d")
    await a.mknod(directory.ino, b"f", FILE, 0, ME)
    with pytest.raises(errors.DirectoryNotEmpty):
        await b.rmdir(ROOT_INO, b"d")
    await a.unlink(directory.ino, b"f")
    await b.rmdir(ROOT_INO, b"d")
    assert await names(a) == []


async def test_a_refused_rmdir_spoils_nothing_that_is_remembered(volumes: Pair) -> None:
    a, b = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    file = await a.mknod(directory.ino, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"d")
    await b.setattr(directory.ino, SetAttr(mode=0o700))
    with pytest.raises(errors.DirectoryNotEmpty):
        await a.rmdir(ROOT_INO, b"d")
    assert (await a.lookup(directory.ino, b"f")).ino == file.ino


async def test_types_are_kept_apart(volumes: Pair) -> None:
    a, b = volumes
    await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    with pytest.raises(errors.IsADirectory):
        await b.unlink(ROOT_INO, b"d")
    with pytest.raises(errors.NotADirectory):
        await b.rmdir(ROOT_INO, b"f")


async def test_nlink_of_directories(volumes: Pair) -> None:
    a, b = volumes
    for name in (b"x", b"y"):
        await a.mkdir(ROOT_INO, name, 0o755, ME)
    await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    assert (await b.getattr(ROOT_INO)).nlink == 4
    await b.rmdir(ROOT_INO, b"x")
    assert (await a.getattr(ROOT_INO)).nlink == 3


# -- links ------------------------------------------------------------------------------------------------------------


async def test_hard_links(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"one", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"one")
    linked = await a.link(file.ino, ROOT_INO, b"two")
    assert linked.nlink == 2
    assert (await b.getattr(file.ino)).nlink == 2
    await b.setattr(file.ino, SetAttr(mode=0o600))
    assert (await a.lookup(ROOT_INO, b"two")).mode == stat.S_IFREG | 0o600
    await b.rename(ROOT_INO, b"one", ROOT_INO, b"three")
    assert (await a.unlink(ROOT_INO, b"two")).nlink == 1
    assert (await a.unlink(ROOT_INO, b"three")).nlink == 0
    assert await names(b) == []


async def test_links_that_are_refused(volumes: Pair) -> None:
    a, _ = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    with pytest.raises(errors.OperationNotPermitted):
        await a.link(directory.ino, ROOT_INO, b"x")
    with pytest.raises(errors.EntryExists):
        await a.link(file.ino, ROOT_INO, b"d")
    await a.unlink(ROOT_INO, b"f")
    with pytest.raises(errors.StaleInode):
        await a.link(file.ino, ROOT_INO, b"x")


# -- rename -----------------------------------------------------------------------------------------------------------


async def test_a_file_that_another_mount_moves_is_found_by_number(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    for step in range(5):
        await a.rename(
            *((ROOT_INO, b"f") if not step else (directory.ino, b"%d" % (step - 1))), directory.ino, b"%d" % step
        )
    assert (await b.getattr(file.ino)).ino == file.ino
    await b.setattr(file.ino, SetAttr(mode=0o400))
    assert (await a.lookup(directory.ino, b"4")).mode == stat.S_IFREG | 0o400


async def test_rename_replaces(volumes: Pair) -> None:
    a, b = volumes
    old = await a.mknod(ROOT_INO, b"old", FILE, 0, ME)
    new = await a.mknod(ROOT_INO, b"new", FILE, 0, ME)
    done = await b.rename(ROOT_INO, b"new", ROOT_INO, b"old")
    assert done.replaced is not None
    assert (done.replaced.ino, done.replaced.nlink) == (old.ino, 0)
    assert (await a.lookup(ROOT_INO, b"old")).ino == new.ino
    assert await names(a) == [b"old"]


async def test_rename_flags(volumes: Pair) -> None:
    a, b = volumes
    one = await a.mknod(ROOT_INO, b"1", FILE, 0, ME)
    two = await a.mkdir(ROOT_INO, b"2", 0o755, ME)
    with pytest.raises(errors.EntryExists):
        await b.rename(ROOT_INO, b"1", ROOT_INO, b"2", RenameFlag.NOREPLACE)
    with pytest.raises(errors.NoSuchEntry):
        await b.rename(ROOT_INO, b"1", ROOT_INO, b"3", RenameFlag.EXCHANGE)
    with pytest.raises(errors.InvalidArgument):
        await b.rename(ROOT_INO, b"1", ROOT_INO, b"3", RenameFlag(4))
    await b.rename(ROOT_INO, b"1", ROOT_INO, b"2", RenameFlag.EXCHANGE)
    assert (await a.lookup(ROOT_INO, b"1")).ino == two.ino
    assert (await a.lookup(ROOT_INO, b"2")).ino == one.ino
    await a.rename(ROOT_INO, b"1", ROOT_INO, b"3", RenameFlag.NOREPLACE)
    assert (await b.getattr(two.ino)).name == b"3"


async def test_rename_of_types(volumes: Pair) -> None:
    a, _ = volumes
    await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    full = await a.mkdir(ROOT_INO, b"full", 0o755, ME)
    await a.mknod(full.ino, b"x", FILE, 0, ME)
    await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    with pytest.raises(errors.IsADirectory):
        await a.rename(ROOT_INO, b"f", ROOT_INO, b"d")
    with pytest.raises(errors.NotADirectory):
        await a.rename(ROOT_INO, b"d", ROOT_INO, b"f")
    with pytest.raises(errors.DirectoryNotEmpty):
        await a.rename(ROOT_INO, b"d", ROOT_INO, b"full")
    await a.rename(ROOT_INO, b"full", ROOT_INO, b"d")
    assert (await a.lookup(ROOT_INO, b"d")).ino == full.ino


async def test_rename_over_the_directory_that_it_is_in(volumes: Pair) -> None:
    a, b = volumes
    outer = await a.mkdir(ROOT_INO, b"outer", 0o755, ME)
    await a.mkdir(outer.ino, b"inner", 0o755, ME)
    for volume in (a, b):
        with pytest.raises(errors.DirectoryNotEmpty):
            await volume.rename(outer.ino, b"inner", ROOT_INO, b"outer")
    assert await names(b, outer.ino) == [b"inner"]


async def test_rename_to_another_name_of_the_same_file_does_nothing(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"1", FILE, 0, ME)
    await a.link(file.ino, ROOT_INO, b"2")
    await b.rename(ROOT_INO, b"1", ROOT_INO, b"2")
    await b.rename(ROOT_INO, b"1", ROOT_INO, b"1")
    assert await names(a) == [b"1", b"2"]


async def test_no_cycle_however_two_mounts_move(volumes: Pair) -> None:
    a, b = volumes
    x = await a.mkdir(ROOT_INO, b"x", 0o755, ME)
    y = await a.mkdir(ROOT_INO, b"y", 0o755, ME)
    await b.lookup(ROOT_INO, b"x")
    await b.lookup(ROOT_INO, b"y")
    await a.rename(ROOT_INO, b"x", y.ino, b"x")
    with pytest.raises(errors.InvalidArgument):
        await b.rename(ROOT_INO, b"y", x.ino, b"y")
    with pytest.raises(errors.InvalidArgument):
        await b.rename(ROOT_INO, b"y", y.ino, b"y")


# -- attributes -------------------------------------------------------------------------------------------------------


async def test_setattr(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await a.setattr(file.ino, SetAttr(mode=0o4711, uid=5, gid=6, atime_ns=-1, mtime_ns=-(10**18)))
    found = await b.lookup(ROOT_INO, b"f")
    assert (found.mode, found.uid, found.gid) == (stat.S_IFREG | 0o4711, 5, 6)
    assert (found.atime_ns, found.mtime_ns) == (-1, -(10**18))
    assert found.ctime_ns > file.ctime_ns
    now = await b.setattr(file.ino, SetAttr(mtime_ns=NOW, clear_suid=True))
    assert now.mtime_ns == now.ctime_ns
    assert now.mode == stat.S_IFREG | 0o711


async def test_times_of_directories(volumes: Pair) -> None:
    a, b = volumes
    directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    await a.setattr(directory.ino, SetAttr(mtime_ns=5))
    assert (await b.getattr(directory.ino)).mtime_ns == 5
    await b.mknod(directory.ino, b"f", FILE, 0, ME)
    assert (await a.getattr(directory.ino)).mtime_ns > 5
    before = await a.getattr(directory.ino)
    await b.setattr(directory.ino, SetAttr(mode=0o700))
    after = await a.getattr(directory.ino)
    assert after.mtime_ns == before.mtime_ns
    assert after.ctime_ns > before.ctime_ns


async def test_flags(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    await a.setattr(file.ino, SetAttr(flags=InodeFlag.IMMUTABLE))
    for refused in (
        lambda: b.unlink(ROOT_INO, b"f"),
        lambda: b.rename(ROOT_INO, b"f", ROOT_INO, b"g"),
        lambda: b.link(file.ino, ROOT_INO, b"g"),
        lambda: b.setattr(file.ino, SetAttr(mode=0)),
        lambda: b.commit_body(file.ino, BodyChange(0, 1, inline=b"x")),
        lambda: b.setxattr(file.ino, b"user.x", b""),
    ):
        with pytest.raises(errors.OperationNotPermitted):
            await refused()
    await b.setattr(file.ino, SetAttr(flags=InodeFlag.APPEND_ONLY))
    await a.setattr(file.ino, SetAttr(mtime_ns=NOW))
    with pytest.raises(errors.OperationNotPermitted):
        await a.setattr(file.ino, SetAttr(size_bytes=0))
    await b.setattr(file.ino, SetAttr(flags=InodeFlag(0)))
    await b.unlink(ROOT_INO, b"f")


async def test_xattrs(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    await a.setxattr(file.ino, b"user.b", b"1", create=True)
    await b.setxattr(file.ino, b"user.a", bytes(65_536))
    with pytest.raises(errors.AttributeExists):
        await b.setxattr(file.ino, b"user.b", b"2", create=True)
    with pytest.raises(errors.NoSuchAttribute):
        await b.setxattr(file.ino, b"user.c", b"2", replace=True)
    with pytest.raises(errors.AttributeTooLarge):
        await b.setxattr(file.ino, b"user.c", bytes(65_537))
    assert await a.listxattr(file.ino) == (b"user.a", b"user.b")
    assert await b.getxattr(file.ino, b"user.b") == b"1"
    await a.rename(ROOT_INO, b"f", ROOT_INO, b"g")
    await b.removexattr(file.ino, b"user.b")
    with pytest.raises(errors.NoSuchAttribute):
        await a.removexattr(file.ino, b"user.b")


async def test_a_policy_ends_where_its_directory_lies_below_one_that_inherited_it(volumes: Pair) -> None:
    a, b = volumes
    outer = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
    await a.placement.set_policy(outer.ino, Policy(read=(1,)))
    inner = await a.mkdir(outer.ino, b"p", 0o755, ME)
    assert inner.policy == outer.ino
    await a.rename(outer.ino, b"p", ROOT_INO, b"p")
    await a.rename(ROOT_INO, b"d", inner.ino, b"d")
    await a.placement.set_policy(outer.ino, None)
    assert (await b.getattr(outer.ino)).policy == 0
    await a.placement.set_policy(outer.ino, Policy(read=(1,)))
    assert (await b.getattr(outer.ino)).policy == outer.ino


def test_what_is_remembered_has_a_bound_in_bytes_too() -> None:
    known = Recollection(keys_max=100, bytes_max=1000)
    for number in range(50):
        key = b"%d" % number
        known.note(key, KeyValue(key, bytes(100), 1, number + 1, 1), number + 1)
        known.note(b"absent %d" % number, None, number + 1)
    assert [number for number in range(50) if known.get(b"%d" % number)] == list(range(40, 50))
    known.forget([b"49"])
    known.note(b"48", KeyValue(b"48", bytes(10), 1, 60, 2), 60)
    known.note(b"48", KeyValue(b"48", bytes(900), 1, 59, 2), 59)
    known.note(b"new", KeyValue(b"new", bytes(190), 1, 61, 1), 61)
    assert known.get(b"40") is not None
    found = known.get(b"48")
    assert found is not None and found[1] == 60
    known.clear()
    known.note(b"last", KeyValue(b"last", bytes(1000), 1, 62, 1), 62)
    assert known.get(b"last") is not None


def test_a_page_of_an_old_moment_is_no_news() -> None:
    known, key = Recollection(), b"k"
    new, old = KeyValue(key, b"new", 1, 9, 2), KeyValue(key, b"old", 1, 5, 1)
    known.note(key, new, 9)
    known.note_range(Range(key, b"l", revision=5), RangeResult((old,), more=False, count=1, revision=20))
    assert known.get(key) == (new, 9)
