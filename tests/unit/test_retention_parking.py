"""Removing a checkpoint: out of sight at once, brought back for who has it open, and gone on with after a crash."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from apollofs.fs.command_volume import command_record
from apollofs.fs.pace import Pace
from apollofs.fs.retention.looking import Looking
from apollofs.fs.retention.parking import RETIRED, Parking
from apollofs.fs.retention.report import RetentionReport
from apollofs.fs.trash import Trash
from apollofs.metadata.errors import NoSuchEntry, Sealed
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, RenameFlag
from apollofs.metadata.sealing import Sealing
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.use_questions import UseQuestions
from apollofs.metadata.volume import Volume, open_volume
from tests.support.filesystems import USER, Pair, close, pair, save
from tests.support.volumes import SITE, VOLUME

__all__ = ["pair"]
KEYS = Keys(VOLUME)
OPTIONS = SessionOptions(lease_ttl_s=10, operation_deadline_s=10, slots=16, delegations=False, write_back=False)


class Crashes(Exception):
    """The process has died."""


class Countdown(Pace):
    """Lets so many operations pass; then the process dies."""

    def __init__(self, left: int) -> None:
        super().__init__(0)
        self.left = left

    async def step(self) -> None:
        await super().step()
        self.left -= 1
        if self.left < 0:
            raise Crashes


@asynccontextmanager
async def parking(pair: Pair, pace: Pace | None = None) -> AsyncIterator[tuple[Parking, Volume, RetentionReport]]:
    record = replace(command_record("0"), site=SITE)
    async with open_volume(pair.store, VOLUME, SITE, OPTIONS, record) as volume:
        questions = UseQuestions(pair.store, KEYS, volume.session, 5.0)
        report = RetentionReport()
        yield Parking(volume, Looking(volume, questions), pace or Pace(0), report), volume, report


async def tree(pair: Pair) -> int:
    """`run/step1` with two files, and one in a directory below; the inode of `run`."""
    run = (await pair.here.mkdir(ROOT_INO, b"run", 0o755, USER)).ino
    step = (await pair.here.mkdir(run, b"step1", 0o755, USER)).ino
    below = (await pair.here.mkdir(step, b"below", 0o755, USER)).ino
    for name, directory in ((b"a", step), (b"b", step), (b"c", below)):
        await save(pair.here, name, b"x" * 1000)
        await pair.here.rename(ROOT_INO, name, directory, name, RenameFlag(0))
    await pair.volume.settle()
    return run


async def entries(volume: Volume, directory: int) -> list[DirectoryEntry]:
    return list((await volume.readdir(directory, b"", 1000)).entries)


async def names(pair: Pair, directory: int) -> list[bytes]:
    return [entry.name for entry in await entries(pair.volume, directory)]


async def test_nobody_finds_it_and_only_root_looks_there(pair: Pair) -> None:
    run = await tree(pair)
    await pair.there.lookup(run, b"step1")
    async with parking(pair) as (parked, volume, report):
        assert await parked.park(run, await entries(volume, run), {})
        for fs in (pair.here, pair.there):
            with pytest.raises(NoSuchEntry):
                await fs.lookup(run, b"step1")
        assert (await pair.there.lookup(ROOT_INO, RETIRED)).mode & 0o777 == 0o700
        await parked.settle()
        assert (report.removed_files, report.errors) == (3, [])
        trashed = await Trash(pair.store, VOLUME).list(0, 10)
        found = [each.path.rpartition(b"step1/") for each in trashed]
        assert all(path.startswith(b"/.retired/trash-") for path, _, _ in found)
        assert sorted(name for _, _, name in found) == [b"a", b"b", b"below/c"]


async def test_directories_go_after_a_week_but_for_what_was_restored(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await tree(pair)
    async with parking(pair) as (parked, volume, _):
        assert await parked.park(run, await entries(volume, run), {})
        await parked.settle()
        trash = Trash(pair.store, VOLUME)
        restored = await trash.restore((await trash.list(0, 10))[0].inode.ino, b"", "0")
        monkeypatch.setattr("apollofs.fs.retention.parking.EMPTIED_S", 0.0)
        await parked.settle()
        directory = ROOT_INO
        for name in restored.split(b"/")[1:-1]:
            directory = (await pair.there.lookup(directory, name)).ino
        assert await names(pair, directory) == [restored.rpartition(b"/")[2]]
        await pair.there.unlink(directory, restored.rpartition(b"/")[2])
        await parked.settle()
    with pytest.raises(NoSuchEntry):
        await pair.there.lookup(ROOT_INO, RETIRED)


async def test_who_has_opened_it_meanwhile_gets_it_back(pair: Pair) -> None:
    run = await tree(pair)
    step = await pair.there.lookup(run, b"step1")
    file = await pair.there.lookup(step.ino, b"a")
    fh = (await pair.there.open(file.ino, os.O_RDONLY, USER)).fh
    async with parking(pair) as (parked, volume, report):
        assert await parked.park(run, await entries(volume, run), {})
        await parked.settle()
        assert (report.brought_back, report.removed_files) == (1, 0)
        assert (await pair.there.lookup(run, b"step1")).ino == step.ino
        assert await parked.park(run, await entries(volume, run), {})
        await pair.here.mkdir(run, b"step1", 0o755, USER)
        await parked.settle()
        assert "can't come back" in report.errors[0]
        assert bytes(await pair.there.read(fh, 0, 10)) == b"x" * 10
        await close(pair.there, fh)
        await parked.settle()
        assert report.removed_files == 3
    assert await names(pair, run) == [b"step1"]


async def test_what_has_changed_since_the_look_stays(pair: Pair) -> None:
    run = await tree(pair)
    await pair.here.symlink(run, b"latest", b"step0", USER)
    await pair.volume.settle()
    async with parking(pair) as (parked, volume, _):
        seen = await entries(volume, run)
        step = [entry for entry in seen if entry.name == b"step1"]
        latest = next(entry for entry in seen if entry.name == b"latest")
        assert latest.inode is not None
        as_read = {KEYS.dentry(run, b"latest"): latest.inode.revision, KEYS.dentry(run, b"checkpoint"): 0}
        await pair.here.symlink(run, b"new", b"step1", USER)
        await pair.here.rename(run, b"new", run, b"latest", RenameFlag(0))
        assert not await parked.park(run, step, as_read)
        assert not await parked.park(run, step, {KEYS.dentry(run, b"latest"): 0})
        await pair.here.rename(run, b"step1", run, b"old", RenameFlag(0))
        assert not await parked.park(run, step, {})
        await pair.here.mkdir(run, b"step1", 0o755, USER)
        assert not await parked.park(run, step, {})
        assert await names(pair, run) == [b"latest", b"old", b"step1"]


async def test_what_was_sealed_since_the_look_stays(pair: Pair) -> None:
    run = await tree(pair)
    async with parking(pair) as (parked, volume, _):
        seen = await entries(volume, run)
        await Sealing(pair.store, pair.volume).seal(seen[0].ino, 10.0)
        with pytest.raises(Sealed):
            await parked.park(run, seen, {})


async def test_several_names_go_at_once_or_not(pair: Pair) -> None:
    for rank in range(16):
        await save(pair.here, b"step1_rank%d" % rank, b"x" * 1000)
    await pair.volume.settle()
    async with parking(pair) as (parked, volume, report):
        seen = await entries(volume, ROOT_INO)
        await pair.here.unlink(ROOT_INO, b"step1_rank15")
        assert not await parked.park(ROOT_INO, seen, {})
        assert len(await names(pair, ROOT_INO)) == 15 + 1  # and RETIRED
        rest = [entry for entry in seen if entry.name != b"step1_rank15"]
        assert await parked.park(ROOT_INO, rest, {})
        assert await names(pair, ROOT_INO) == [RETIRED]
        await parked.settle()
        assert (report.removed_files, report.errors) == (15, [])


@pytest.mark.parametrize("steps", range(3))
async def test_what_a_crash_has_left_is_gone_on_with(pair: Pair, steps: int) -> None:
    run = await tree(pair)
    with pytest.RaisesGroup(Crashes, flatten_subgroups=True):
        async with parking(pair, Countdown(steps)) as (parked, volume, _):
            assert await parked.park(run, await entries(volume, run), {})
            await parked.settle()
    assert await names(pair, run) == []
    async with parking(pair) as (parked, _, report):
        await parked.settle()
        assert (report.removed_files, report.errors) == (3 - steps, [])
    retired = await names(pair, (await pair.here.lookup(ROOT_INO, RETIRED)).ino)
    assert len(retired) == 1 and retired[0].startswith(b"trash-")
