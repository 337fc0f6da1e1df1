"""Retention on a volume in memory: what stays is there with all that is in it, what goes is gone from everywhere."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio

from apollofs.fs.retention import ApplyOptions, RetentionReport
from apollofs.fs.retention.applying import is_due, run_once
from apollofs.metadata.errors import RoleTaken, SessionLost, StaleInode
from apollofs.metadata.records import ROOT_INO, InodeFlag, RenameFlag, SetAttr
from apollofs.metadata.retention import read_retentions
from apollofs.metadata.sealing import Sealing
from apollofs.metadata.usage import UsageKeeper
from apollofs.metadata.volume import open_volume
from tests.support.filesystems import LARGE, USER, Pair, close, pair
from tests.support.retaining import KEYS, NOW, OPTIONS, Run, apply, keep, mkdir, retainer, write
from tests.support.volumes import SITE, VOLUME, mount_record

__all__ = ["pair"]


def reasons(report: RetentionReport) -> dict[int, str]:
    return {line.verdict.checkpoint.step: f"{line.verdict.why} {line.verdict.detail}".strip() for line in report.lines}


async def test_the_newest_stay_and_the_rest_is_in_the_trash(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, 4)
    assert await run.left() == {1, 2, 3, 4}
    await keep(pair, replace(NOW, last=2))
    dry = await apply(pair, ApplyOptions(dry_run=True))
    assert (dry.removed, dry.removed_bytes, dry.kept) == (2, 4 * len(LARGE), 2)
    assert await run.left() == {1, 2, 3, 4}
    report = await apply(pair)
    assert (report.removed, report.removed_files, report.removed_bytes) == (2, 4, 4 * len(LARGE))
    assert reasons(report) == {
        **dict.fromkeys((1, 2), "not kept by any rule"),
        3: "among the last 2",
        4: "among the last 2",
    }
    assert await run.left() == {3, 4}
    assert report.errors == []
    again = await apply(pair)
    assert (again.removed, again.kept) == (0, 2)


async def test_what_is_open_anywhere_stays_and_is_not_counted(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, 4)
    opened = []
    for step, flags in ((1, os.O_RDONLY), (4, os.O_RDWR)):
        inode = await pair.there.lookup(run.inos[step], b"model")
        opened.append((await pair.there.open(inode.ino, flags, USER)).fh)
    await keep(pair, NOW)
    report = await apply(pair)
    assert await run.left() == {1, 3, 4}
    assert reasons(report)[1] == "open on host:/mnt"
    for fh in opened:
        await close(pair.there, fh)
    await apply(pair)
    assert await run.left() == {4}


async def test_what_is_sealed_pinned_or_named_stays(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, 4, 5, 6, 7)
    await pair.here.symlink(ROOT_INO, b"best", b"./step2", USER)
    await write(pair.here, b"latest", b"step7")
    await pair.volume.setattr((await pair.here.lookup(run.inos[3], b"model")).ino, SetAttr(flags=InodeFlag.IMMUTABLE))
    await pair.volume.settle()
    await Sealing(pair.store, pair.volume).seal(run.inos[4], 10.0)
    await keep(pair, NOW)
    report = await apply(pair)
    found = reasons(report)
    assert (found[2], found[7], found[3], found[4]) == ("named by best", "named by latest", "immutable", "sealed")
    assert await run.left() == {2, 3, 4, 7}


async def test_what_may_be_incomplete_stays_and_is_not_counted(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2)
    await run.save(3, files=(b"model", b"optimizer.tmp"))
    await run.save(4, files=(b"__0_0.distcp", b"__1_0.distcp"))
    await run.save(5)
    await write(pair.here, b"latest_checkpointed_iteration.txt", b"2")
    await keep(pair, NOW)
    found = reasons(await apply(pair))
    assert found[3] == "incomplete latest_checkpointed_iteration.txt means step 2"
    assert await run.left() == {2, 3, 4, 5}
    await pair.here.unlink(ROOT_INO, b"latest_checkpointed_iteration.txt")
    await run.save(6, 7)
    await pair.here.rename(ROOT_INO, b"step6", ROOT_INO, b"step6.tmp", RenameFlag(0))
    found = reasons(await apply(pair))
    assert found[3] == "incomplete optimizer.tmp is in it"
    assert found[4] == "incomplete .metadata is not in it"
    assert found[6] == "incomplete by its name step6.tmp"
    assert await run.left() == {3, 4, 7}


async def test_a_marker_and_a_time_of_rest(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, files=(b"model", b"DONE"))
    await run.save(4)
    await keep(pair, replace(NOW, marker="DONE"))
    assert reasons(await apply(pair))[4] == "incomplete DONE is not in it"
    assert await run.left() == {3, 4}
    await run.save(5, 6, files=(b"model", b"DONE"))
    await keep(pair, replace(NOW, marker="DONE", settle_s=3600))
    report = await apply(pair)
    assert (report.removed, report.kept_by_reason) == (0, {"changed lately": 4})


async def test_files_of_one_step_go_together(pair: Pair) -> None:
    for step in (1, 2, 3):
        for rank in range(3 if step < 3 else 2):
            await write(pair.here, b"step%d_rank%d.pt" % (step, rank))
    await keep(pair, NOW)
    report = await apply(pair)
    assert reasons(report)[3].startswith("incomplete 2 names of a kind of which the step before has 3")
    assert (report.removed, report.removed_files) == (1, 3)
    for rank in range(17):
        await write(pair.here, b"step0_rank%d.pt" % rank)
    assert "at most 16" in reasons(await apply(pair))[0]


async def test_below_each_directory_is_for_itself(pair: Pair) -> None:
    top = await mkdir(pair.here, b"runs")
    runs = [Run(pair, await mkdir(pair.here, name, top)) for name in (b"a", b"b", b"own")]
    for run in runs:
        await run.save(1, 2, 3)
    await pair.volume.settle()
    await keep(pair, replace(NOW, is_recursive=True), top)
    await keep(pair, replace(NOW, last=2), runs[2].directory)
    report = await apply(pair)
    assert [await run.left() for run in runs] == [{3}, {3}, {2, 3}]
    assert report.directories == 3


async def test_space_is_what_the_volume_does_not_hold(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, 4)
    held = (await pair.volume.usage()).bytes
    each = 2 * len(LARGE)
    await UsageKeeper(pair.volume._transactor, KEYS).flush(pair.volume.session)  # as every few seconds
    squeeze = replace(NOW, every=1, capacity_bytes=held + each, min_free_bytes=each)
    await keep(pair, squeeze)
    assert (await apply(pair)).removed == 0
    await keep(pair, replace(squeeze, min_free_bytes=2 * each + 1))
    assert (await apply(pair, ApplyOptions(dry_run=True))).removed == 2
    assert (await apply(pair)).removed == 2
    assert await run.left() == {3, 4}
    await keep(pair, replace(squeeze, min_free_bytes=held + each))
    report = await apply(pair)
    assert (report.removed, report.lacking_bytes) == (1, each)


async def test_one_at_a_time_and_forgotten_with_the_directory(pair: Pair) -> None:
    assert not await is_due(pair.store, KEYS)
    gone = await mkdir(pair.here, b"gone")
    await pair.volume.settle()
    await keep(pair, NOW, gone)
    assert await is_due(pair.store, KEYS)
    await pair.here.rmdir(ROOT_INO, b"gone")
    await pair.volume.settle()
    async with retainer(pair) as (volume, bodies):
        await run_once(pair.store, volume, bodies, ApplyOptions())
        with pytest.raises(BaseExceptionGroup) as caught:
            await apply(pair)
        assert caught.group_contains(RoleTaken)
    assert await read_retentions(pair.store, KEYS) == {}
    with pytest.raises(StaleInode):
        await keep(pair, NOW, gone)


async def test_a_mount_that_does_not_answer_keeps_everything(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await keep(pair, NOW)
    silent = mount_record("/silent")
    async with open_volume(pair.store, VOLUME, SITE, replace(OPTIONS, lease_ttl_s=60), silent) as volume:
        volume.uses.recalled = lambda wanted, what: None  # type: ignore[method-assign]
        report = await apply(pair, ApplyOptions(answer_wait_s=0.1))
    assert report.kept_by_reason == {"a mount does not answer": 3}
    assert await run.left() == {1, 2, 3}


@pytest.mark.expects_log("session .* has lost its lease")
async def test_who_has_lost_its_session_removes_nothing_more(pair: Pair) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await keep(pair, NOW)
    silent = mount_record("/silent")
    async with (
        open_volume(pair.store, VOLUME, SITE, replace(OPTIONS, lease_ttl_s=60), silent) as mute,
        retainer(pair) as (volume, bodies),
        trio.open_nursery() as nursery,
    ):

        def end_the_run(wanted: tuple[int, ...], what: bytes) -> None:
            nursery.start_soon(pair.store.lease_revoke, volume.session.lease_id)

        mute.uses.recalled = end_the_run  # type: ignore[method-assign]
        with pytest.raises(SessionLost):
            await run_once(pair.store, volume, bodies, ApplyOptions(answer_wait_s=60))
    assert await run.left() == {1, 2, 3}
