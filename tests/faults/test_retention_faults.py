"""Retention killed at each of its requests: a checkpoint is there whole or not at all, and the next run goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from apollofs.fs.user_error import leaves
from apollofs.metadata import codec
from apollofs.metadata.errors import StoreError
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Range, prefix_end
from tests.faults.hooked_store import HookedStore
from tests.support.filesystems import LARGE, USER, Pair, close, pair
from tests.support.retaining import KEYS, NOW, Run, apply, keep, write

__all__ = ["pair"]
pytestmark = pytest.mark.faults
REQUESTS = ("txn", "range", "lease_grant", "lease_revoke")
STEPS = 115
"""As many requests as a run has."""


class Killed(StoreError):
    """The process ends here."""


class Death:
    """Nothing that is asked at or after a request is done any more."""

    def __init__(self, pair: Pair, step: int, moment: Moment) -> None:
        self._left = step
        self._moment = moment
        self.store = HookedStore(pair.store, self._hook)

    async def _hook(self, moment: Moment, request: Request) -> None:
        if request.method not in REQUESTS:
            return
        if moment is self._moment:
            self._left -= 1
        if self._left < 0:
            raise Killed("by the test")


@contextmanager
def dying() -> Iterator[None]:
    """Ends well, or with nothing but a death."""
    try:
        yield
    except (BaseExceptionGroup, Killed) as exc:
        if any(not isinstance(each, Killed) for each in leaves(exc)):
            raise


async def bury(pair: Pair) -> None:
    """The leases of processes that have died end."""
    found = await pair.store.range(Range(KEYS.mounts, prefix_end(KEYS.mounts)))
    for kv in found.kvs:
        if not codec.decode_mount(kv.value).serves_files:
            await pair.store.lease_revoke(kv.lease)


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(0, STEPS, 3))
async def test_killed_at_a_request(pair: Pair, step: int, moment: Moment) -> None:
    run = Run(pair)
    await run.save(1, 2, 3, 4)
    await write(pair.here, b"latest", b"step4")
    oldest = await pair.there.lookup(run.inos[1], b"model")
    reader = (await pair.there.open(oldest.ino, os.O_RDONLY, USER)).fh
    await pair.volume.settle()
    await keep(pair, replace(NOW, last=1))
    with dying():
        await apply(pair, store=Death(pair, step, moment).store)
    assert await run.left() >= {1, 4}
    await bury(pair)
    report = await apply(pair)
    assert report.errors == []
    assert await run.left() == {1, 4}
    for name in run.files[1]:
        file = await pair.there.lookup(run.inos[1], name)
        assert file.nlink == 1
    assert bytes(await pair.there.read(reader, 0, 1 << 20)) == LARGE
    await close(pair.there, reader)
    for entry in (await pair.volume.readdir((await pair.here.lookup(ROOT_INO, b".retired")).ino, b"", 10)).entries:
        assert entry.name.startswith(b"trash-")
