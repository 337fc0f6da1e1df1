"""Random schedules as those of `test_histories.py`, at three sites: 10, 40 and 80 ms from an etcd of three members,
each with a bucket and an agent, under policies; amid faults of mounts, stores, agents and members. What processes saw
must be linearizable, and who learnt of a file, by the log, a value or its name, must find its bytes.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.history_hosts import FAULTS
from tests.faults.history_learners import Learned
from tests.faults.history_sites import SiteSchedule, SiteTrio
from tests.mounted.three_sites import SITES
from tests.support.history import check
from tests.support.radosgw_server import shared_gateway

pytestmark = [pytest.mark.faults, pytest.mark.mounted, pytest.mark.slow]
SCHEDULES = int(os.environ.get("APOLLOFS_SITES_SCHEDULES", "4"))
SEED = int(os.environ.get("APOLLOFS_SITES_SEED", "6"))


@pytest.fixture(scope="module")
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteTrio]:
    with SiteTrio.at(tmp_path_factory.mktemp("sites"), shared_gateway(request.config)) as trio:
        yield trio


def site_of(host: str) -> str:
    """Of a mount's name."""
    return host.split("-")[1]


def judge(learned: list[Learned], broken: set[str]) -> None:
    """No file was missing, or had other bytes. Where the mount had no fault nothing failed, whatever became of stores,
    agents and members."""
    assert [text for each in learned for text in each.wrong] == []
    assert any(each.found["end"] for each in learned), "something was published"
    for each in learned:
        if site_of(each.host) not in broken:
            assert each.errors.keys() <= {errno.ESTALE}


@pytest.mark.parametrize("seed", range(SEED, SEED + SCHEDULES))
def test_a_random_schedule_over_three_sites_is_linearizable(trio: SiteTrio, seed: int) -> None:
    schedule = SiteSchedule.of(seed)
    told = trio.run(schedule)
    learned = trio.learned()
    history = [operation for each in told for operation in each.history]
    found = sum((each.found for each in learned), Counter[str]())
    print(schedule.name, *schedule.faults, *(each.errors for each in told), found, sep="\n")
    print(f"{len(history)} operations, {check(history)} nodes")
    assert trio.namespace.violations() == []
    alarms = [line for mount in trio.namespace.mounts for line in mount.alarms()]
    assert alarms == []
    broken = {SITES[fault.host] for fault in schedule.faults if fault.kind in FAULTS}
    judge(learned, broken)
    for each in told:
        if each.history and site_of(each.history[0].host) not in broken:
            assert {number for _, number in each.errors} <= {errno.ESTALE}, "a mount without a fault fails nothing"
