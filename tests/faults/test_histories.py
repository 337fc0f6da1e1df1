"""Random schedules: processes on three mounts that change and look at a few names, amid mounts that are killed, frozen,
cut off and slow. What they saw must be linearizable but for the one limit of docs/POSIX.md (`tests/support/history`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.history_hosts import SITES, Host, Schedule, Trio
from tests.mounted.harness import Namespace
from tests.mounted.variants import RivalNamespace
from tests.support.history import NotLinearizable, check

pytestmark = [pytest.mark.faults, pytest.mark.mounted, pytest.mark.slow]
SCHEDULES = int(os.environ.get("APOLLOFS_HISTORY_SCHEDULES", "6"))
SEED = int(os.environ.get("APOLLOFS_HISTORY_SEED", "1"))
STALE_SCHEDULES_MAX = 3


@pytest.fixture(scope="module", params=[Namespace, RivalNamespace], ids=["plain", "turns"])
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio[Host]]:
    with Trio.started(tmp_path_factory.mktemp("trio"), request.param) as trio:
        yield trio


@pytest.mark.parametrize("seed", range(SEED, SEED + SCHEDULES))
def test_a_random_schedule_is_linearizable(trio: Trio[Host], seed: int) -> None:
    schedule = Schedule.of(seed)
    told = trio.run(schedule)
    history = [operation for each in told for operation in each.history]
    print(*schedule.faults, *(each.errors for each in told), f"{len(history)} operations", sep="\n")
    nodes = check(history)
    print(f"{nodes} nodes")
    assert trio.namespace.violations() == []
    alarms = [line for mount in trio.namespace.mounts for line in mount.alarms()]
    assert alarms == []
    broken = {SITES[fault.host] for fault in schedule.faults}
    for each in told:
        if each.history and each.history[0].host.split("-")[1] not in broken:
            assert {number for _, number in each.errors} <= {errno.ESTALE}, "a mount without a fault fails nothing"


class StaleNamespace(Namespace):
    """Whose mounts have the bug of `stale_mount.py`."""

    mount_module = "tests.faults.stale_mount"


def test_a_kernel_that_keeps_what_was_recalled_is_found_out(tmp_path: Path) -> None:
    """These histories would show it."""
    with Trio.started(tmp_path, StaleNamespace) as trio:
        for seed in range(STALE_SCHEDULES_MAX):
            told = trio.run(Schedule(seed, []))
            try:
                check(operation for each in told for operation in each.history)
            except NotLinearizable:
                return
    pytest.fail("nothing stale was found")
