"""What mounts leave behind: kept while it may be the only copy, gone when it is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from apollofs.fs.cli.app import cli
from apollofs.fs.leftovers import directory_of, leftovers, rescue, settle
from apollofs.fs.staging import open_staging
from tests.support.bodies import body_world


async def left_by_a_dead_mount(cache_dir: Path, ino: int, data: bytes, place: tuple[int, bytes] | None = None) -> Path:
    """A working copy whose daemon was killed; its path once the next mount has begun."""
    async with open_staging(str(cache_dir), 0) as area:
        copy = area.open_copy(ino, place)
        await copy.write(0, data)
        copy.close(keep=True)
    (found,) = [one for one in leftovers(str(cache_dir)) if one.ino == ino]
    return Path(found.path)


async def test_a_copy_outlives_its_mount_and_an_empty_one_does_not(tmp_path: Path) -> None:
    path = await left_by_a_dead_mount(tmp_path, 7, b"only copy", (1, b"name/with\xff"))
    async with open_staging(str(tmp_path), 0) as area:
        area.open_copy(8).close(keep=True)
    (found,) = leftovers(str(tmp_path))
    assert (found.path, found.size_bytes, found.place, found.in_use) == (str(path), 9, (1, b"name/with\xff"), False)


async def test_a_cache_directory_that_was_emptied_is_made_anew(tmp_path: Path) -> None:
    async with open_staging(str(tmp_path), 0) as area:
        shutil.rmtree(tmp_path / "staging")
        assert area.has_room in (True, False)
        copy = area.open_copy(7)
        await copy.write(0, b"x")
        async with open_staging(str(tmp_path), 0):
            await copy.write(1, b"its mount lives")
            assert await trio.Path(copy.path).exists()
        copy.close()


async def test_what_is_in_use_is_said_to_be(tmp_path: Path) -> None:
    path = await left_by_a_dead_mount(tmp_path, 7, b"x")
    with path.open("rb"):
        assert [one.in_use for one in leftovers(str(tmp_path))] == [True]
    assert [one.in_use for one in leftovers(str(tmp_path))] == [False]


@pytest.mark.expects_log(r"may hold what was never committed")
async def test_what_was_committed_as_it_is_goes_at_the_next_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with body_world(tmp_path / "world") as world, world.mount() as mount:
        files = {}
        for name in (b"committed", b"longer", b"removed", b"restored"):
            file = mount.bodies.pass_through(await mount.bodies.open(await mount.create(name)))
            os.pwrite(file.copy.fd, b"text of " + name, 0)
            await file.commit()
            files[name] = file
        os.pwrite(files[b"longer"].copy.fd, b"more", 100)
        os.utime(files[b"restored"].copy.fd, (0, 0))  # as tar and rsync do: nothing says that this was committed
        cache = tmp_path / "cache"
        dead = cache / "staging" / "dead"
        dead.mkdir(parents=True)
        for file in files.values():
            os.link(file.copy.path, dead / os.path.basename(file.copy.path))
        rescue(str(dead), str(cache))
        await mount.volume.inner.unlink(1, b"removed")
        for file in files.values():
            file.copy.close()
        await settle(str(cache), mount.volume.inner)
        assert {found.ino for found in leftovers(str(cache))} == {files[b"longer"].ino, files[b"restored"].ino}
        monkeypatch.setattr("apollofs.fs.leftovers.KEEP_S", 0)
        await settle(str(cache), mount.volume.inner)
        assert list(leftovers(str(cache))) == []


def test_a_person_lists_recovers_and_drops(tmp_path: Path) -> None:
    volume = tmp_path / "volume-x"
    path = trio.run(left_by_a_dead_mount, volume, 7, b"only copy", (1, b"model"))
    run = CliRunner()
    options = ("--cache-dir", str(tmp_path))
    listed = run.invoke(cli, ["staging", "list", *options])
    assert "model" in listed.output
    name = path.name.removesuffix(".copy")
    target = tmp_path / "recovered"
    assert run.invoke(cli, ["staging", "recover", name, str(target), *options]).exit_code == 0
    assert target.read_bytes() == b"only copy"
    assert run.invoke(cli, ["staging", "recover", name, str(target), *options]).exit_code != 0
    assert run.invoke(cli, ["staging", "drop", name, *options]).exit_code == 0
    assert os.listdir(directory_of(str(volume))) == []
    assert "nothing is left" in run.invoke(cli, ["staging", "list", *options]).output
    assert run.invoke(cli, ["staging", "drop", name, *options]).exit_code != 0
