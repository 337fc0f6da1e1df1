"""A site's agent killed at each of its requests and puts: its successor goes on, and nothing is left over."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import StoreError
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO
from tests.faults.hooked_store import HookedStore
from tests.support.collecting import keys_in
from tests.support.filesystems import LARGE, USER, save
from tests.support.sites import A, B, C, Sites, sites, until_done

__all__ = ["sites"]
pytestmark = pytest.mark.faults
REQUESTS = ("txn", "range")
NAMES = (b"kept", b"dropped", b"changed")


class Killed(StoreError):
    """The agent's process ends here."""


class Death:
    """Nothing that is asked after `step` requests is done any more."""

    def __init__(self, step: int) -> None:
        self._left = step
        self.came = trio.Event()

    async def step(self) -> None:
        self._left -= 1
        if self._left < 0:
            self.came.set()
            await trio.lowlevel.checkpoint()
            raise Killed("by the test")


async def copy_until_killed(sites: Sites, death: Death, store: HookedStore | None) -> None:
    """An agent of B that dies, or is done before."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def die() -> None:
                await death.came.wait()
                scope.cancel()

            nursery.start_soon(die)
            async with sites.agent(B, store=store or sites.store) as agent:
                await until_done(agent, sites.store)
            nursery.cancel_scope.cancel()


async def assert_all_well(sites: Sites) -> None:
    """Some files change, a successor works, the collector runs: copies of what is there, and of nothing else."""
    async with sites.mount(A) as (here, volume):
        await here.unlink(ROOT_INO, b"dropped")
        fh = (await here.open((await here.lookup(ROOT_INO, b"changed")).ino, 2, USER)).fh
        await here.write(fh, 0, LARGE[::-1])
        await here.fsync(fh, data_only=False)
        await here.release(fh, 7, flock=False)
        await volume.settle()
        async with sites.agent(B) as agent:
            await until_done(agent)
        for name in (b"kept", b"changed"):
            assert await sites.copied_to(B, volume, (await here.lookup(ROOT_INO, name)).ino)
    report = await sites.collect()
    assert report.errors == []
    assert await sites.objects(A) == await sites.objects(B)
    assert len(await sites.objects(A)) == 2
    assert await sites.objects(C) == set()
    assert len(await keys_in(sites.store, "b")) == 2


async def prepare(sites: Sites) -> None:
    await sites.set_policy(Policy(soon=(B,)))
    async with sites.mount(A) as (here, _):
        for name in NAMES:
            await save(here, name, LARGE)


@pytest.mark.expects_log("the agent begins again: by the test")
@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("step", range(0, 40, 2))
async def test_killed_at_a_request(sites: Sites, step: int, moment: Moment) -> None:
    await prepare(sites)
    death = Death(step)

    async def hook(when: Moment, request: Request) -> None:
        if when is moment and request.method in REQUESTS:
            await death.step()

    await copy_until_killed(sites, death, HookedStore(sites.store, hook))
    await assert_all_well(sites)


@pytest.mark.parametrize("step", range(3))
async def test_killed_at_a_put(sites: Sites, step: int) -> None:
    await prepare(sites)
    death = Death(step)

    async def die() -> None:
        with contextlib.suppress(Killed):
            await death.step()
            return
        await trio.sleep_forever()

    sites.blobs[B].before_put = die
    await copy_until_killed(sites, death, None)
    sites.blobs[B].before_put = None
    await assert_all_well(sites)


@pytest.mark.expects_log("the agent begins again")
async def test_frozen_and_replaced(sites: Sites) -> None:
    """An agent whose lease has ended while it was copying: what it still puts changes nothing."""
    await prepare(sites)
    arrived, go_on = trio.Event(), trio.Event()

    async def wait() -> None:
        arrived.set()
        await go_on.wait()

    sites.blobs[B].before_put = wait
    async with sites.agent(B) as frozen:
        await arrived.wait()
        sites.blobs[B].before_put = None
        await sites.store.lease_revoke(frozen.session.lease_id)
        async with sites.agent(B) as successor:
            await until_done(successor)
            go_on.set()
            await frozen.session.lost.wait()
    await assert_all_well(sites)
