"""What others change between the look and the removal: a checkpoint goes only if its verdict would be the same."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from apollofs.fs.retention import RetentionReport
from apollofs.fs.retention.parking import Parking
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, RenameFlag
from tests.support.filesystems import USER, Pair, close, pair
from tests.support.retaining import NOW, Run, apply, keep, mkdir, set_retention, write

__all__ = ["pair"]
Meanwhile = Callable[[], Awaitable[object]]


@pytest.fixture
def apply_while(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Callable[[Meanwhile], Awaitable[RetentionReport]]:
    """A run in which something happens when all was looked at and nothing is moved, and how often it tries to move."""
    park = Parking.park

    async def run(meanwhile: Meanwhile, *, always: bool = False) -> RetentionReport:
        done = 0

        async def late(
            self: Parking, directory: int, entries: Sequence[DirectoryEntry], unchanged: Mapping[bytes, int]
        ) -> int:
            nonlocal done
            if always or not done:
                done += 1
                await meanwhile()
            return await park(self, directory, entries, unchanged)

        monkeypatch.setattr(Parking, "park", late)
        return await apply(pair)

    return run


Applied = Callable[..., Awaitable[RetentionReport]]


def kept(report: RetentionReport, step: int) -> str:
    (verdict,) = (each.verdict for each in report.lines if each.verdict.checkpoint.step == step)
    assert not verdict.goes
    return verdict.detail


async def test_what_a_new_link_names_stays(pair: Pair, apply_while: Applied) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await keep(pair, NOW)
    report = await apply_while(lambda: pair.here.symlink(ROOT_INO, b"good", b"step1", USER))
    assert await run.left() == {1, 3}
    assert (report.removed, kept(report, 1)) == (1, "by good")


async def test_what_a_tracker_says_by_now_stays(pair: Pair, apply_while: Applied) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await write(pair.here, b"last-good.txt", b"step3")
    await keep(pair, NOW)

    async def write_in_place() -> None:
        inode = await pair.there.lookup(ROOT_INO, b"last-good.txt")
        opened = await pair.there.open(inode.ino, os.O_RDWR, USER)
        await pair.there.write(opened.fh, 0, b"step2")
        await close(pair.there, opened.fh)

    report = await apply_while(write_in_place)
    assert kept(report, 2) == "one that the policy keeps has just been changed or removed"
    assert await run.left() == {1, 2, 3}
    assert kept(await apply(pair), 2) == "by last-good.txt"
    assert await run.left() == {2, 3}


async def test_of_any_number_of_trackers_each_counts(pair: Pair, apply_while: Applied) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    for rank in range(40):
        await write(pair.here, b"latest-%02d" % rank, b"step3")
        await pair.here.symlink(ROOT_INO, b"link-%02d" % rank, b"step3", USER)
    await keep(pair, NOW)

    async def replace_both() -> None:
        for old, target in ((b"latest-39", b"step1"), (b"link-39", b"step2")):
            await pair.here.symlink(ROOT_INO, b"new", target, USER)
            await pair.here.rename(ROOT_INO, b"new", ROOT_INO, old, RenameFlag(0))

    await apply_while(replace_both)
    assert await run.left() == {1, 2, 3}
    for rank in range(40, 120):
        await write(pair.here, b"latest-%02d" % rank, b"step3")
    for name in (b"latest-39", b"link-39"):
        await pair.here.unlink(ROOT_INO, name)
    report = await apply(pair)
    assert "at most 99" in kept(report, 1)


@pytest.mark.parametrize("policy", [None, replace(NOW, last=3)])
async def test_a_policy_that_is_changed_stops_at_once(pair: Pair, apply_while: Applied, policy: None) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await keep(pair, NOW)
    report = await apply_while(lambda: set_retention(pair.volume, ROOT_INO, policy))
    assert await run.left() == {1, 2, 3}
    assert kept(report, 1) == "the policy has just been changed"


async def run_below(pair: Pair) -> tuple[int, int, Run]:
    """A directory with a recursive policy, one in it, and in that one a run with two checkpoints."""
    top = await mkdir(pair.here, b"runs")
    middle = await mkdir(pair.here, b"middle", top)
    run = Run(pair, await mkdir(pair.here, b"run", middle))
    await run.save(1, 2)
    await pair.volume.settle()
    await keep(pair, replace(NOW, is_recursive=True), top)
    return top, middle, run


async def test_a_policy_that_is_set_on_the_way_down_stops_what_is_below(pair: Pair, apply_while: Applied) -> None:
    _, middle, run = await run_below(pair)
    await apply_while(lambda: keep(pair, replace(NOW, last=9, is_recursive=True), middle))
    assert await run.left() == {1, 2}


async def test_what_was_moved_out_of_the_policy_stays(pair: Pair, apply_while: Applied) -> None:
    top, _, run = await run_below(pair)
    report = await apply_while(lambda: pair.here.rename(top, b"middle", ROOT_INO, b"saved", RenameFlag(0)))
    assert kept(report, 1) == "the directory has just been moved"
    assert await run.left() == {1, 2}


async def test_the_last_one_stays_when_a_newer_one_is_removed(pair: Pair, apply_while: Applied) -> None:
    run = Run(pair)
    await run.save(1, 2, 3)
    await keep(pair, NOW)
    await mkdir(pair.here, b"elsewhere")
    report = await apply_while(lambda: pair.here.rename(ROOT_INO, b"step3", ROOT_INO, b"mine", RenameFlag(0)))
    assert await run.left() == {1, 2}
    assert "that the policy keeps" in kept(report, 1)


async def test_other_changes_beside_it_hold_nothing_up(pair: Pair, apply_while: Applied) -> None:
    runs = [Run(pair, await mkdir(pair.here, name)) for name in (b"a", b"b")]
    for run in runs:
        await run.save(1, 2, 3)
    away = await mkdir(pair.here, b"away")
    await mkdir(pair.here, b"moved")
    await pair.volume.settle()
    await keep(pair, replace(NOW, is_recursive=True))

    async def others_work() -> None:
        await runs[1].save(4)
        await write(pair.here, b"events", b"x", runs[0].directory)
        await pair.here.rename(ROOT_INO, b"moved", away, b"moved", RenameFlag(0))

    report = await apply_while(others_work)
    assert [await run.left() for run in runs] == [{3}, {3, 4}]
    assert (report.removed, report.errors) == (4, [])


async def test_where_names_change_all_the_time_it_waits_for_the_next_run(pair: Pair, apply_while: Applied) -> None:
    run = Run(pair)
    await run.save(1, 2)
    await keep(pair, NOW)
    made = 0

    async def one_more() -> None:
        nonlocal made
        made += 1
        await write(pair.here, b"note%d" % made, b"x")

    report = await apply_while(one_more, always=True)
    assert (made, report.kept_by_reason["changed lately"]) == (5, 1)
    assert await run.left() == {1, 2}
    assert (await apply(pair)).errors == []
