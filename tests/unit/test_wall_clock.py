"""Times that a mount gives follow its host's wall clock, and go back with it only where it was set."""

from __future__ import annotations

import time

import pytest

from apollofs.metadata.records import ROOT_INO, SetAttr
from apollofs.metadata.transact import CLOCK_SET_NS
from tests.support.volumes import ME, Pair
from tests.support.volumes import volumes as volumes

HOUR_NS = 3600 * 10**9


@pytest.mark.parametrize("back_ns", [HOUR_NS, CLOCK_SET_NS // 2])
async def test_a_clock_that_goes_back(volumes: Pair, monkeypatch: pytest.MonkeyPatch, back_ns: int) -> None:
    volume, _ = volumes
    made = await volume.mknod(ROOT_INO, b"f", 0o100644, 0, ME)
    now_ns = made.ctime_ns - back_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    first = await volume.setattr(made.ino, SetAttr(mode=0o600))
    assert first.ctime_ns == (now_ns if back_ns > CLOCK_SET_NS else made.ctime_ns + 1)
    second = await volume.setattr(made.ino, SetAttr(mode=0o644))
    assert second.ctime_ns == first.ctime_ns + 1
