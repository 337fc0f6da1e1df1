"""A site that can't be read: what is at others goes on being copied, and nothing of it is lost."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.agent.backlog import WANTED_MAX, Backlog
from apollofs.fs.agent.context import AgentContext
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.policy import Policy
from apollofs.metadata.volume import Volume
from tests.support.filesystems import LARGE, save
from tests.support.sites import A, B, C, Sites, sites, until_done

__all__ = ["sites"]
SOON_B = Policy(soon=(B,))
JOBS_MAX = 20
FILES = 3 * JOBS_MAX


@pytest.fixture(autouse=True)
def small_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backlog.__init__, "__defaults__", (JOBS_MAX, WANTED_MAX))
    monkeypatch.setattr("apollofs.fs.agent.away.RETRY_FIRST_S", 0.01)


class Cut:
    """The way to a site's store, for reading: its own mounts only write."""

    def __init__(self, sites: Sites, site: int) -> None:
        self.is_cut = True
        sites.blobs[site].before_read = self._refuse

    async def _refuse(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_cut:
            raise BlobStoreUnavailable("no way there")


async def until_copied(sites: Sites, volume: Volume, inos: list[int]) -> None:
    with trio.fail_after(60):
        for ino in inos:
            while not await sites.copied_to(B, volume, ino):
                await trio.testing.wait_all_tasks_blocked(0.001)


async def until_walked(agent: AgentContext) -> None:
    with trio.fail_after(60):
        while not agent.state.walked or agent.progress.walking:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_what_is_committed_elsewhere_is_copied_meanwhile(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.mount(C) as (there, others), sites.agent(B) as agent:
        await until_walked(agent)
        way, began = Cut(sites, A), agent.state.position
        inos = [await save(here, b"a%d" % number, LARGE) for number in range(FILES)]
        ino = await save(there, b"c", LARGE)
        await until_copied(sites, others, [ino])
        assert len(agent.backlog) <= JOBS_MAX // 4
        assert agent.backlog.position <= agent.backlog.heard - FILES, "nothing is passed over"
        assert began <= agent.backlog.position
        newest = agent.backlog.heard - FILES
        way.is_cut = False
        await until_copied(sites, volume, inos)
        await until_done(agent)
        with trio.fail_after(60):
            while agent.backlog.position < newest:
                await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_successor_goes_on_with_what_was_left_out(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.mount(C) as (there, others):
        way = Cut(sites, A)
        async with sites.agent(B) as first:
            await until_walked(first)
            inos = [await save(here, b"a%d" % number, LARGE) for number in range(FILES)]
            await until_copied(sites, others, [await save(there, b"c", LARGE)])
            assert first.backlog.away
        way.is_cut = False
        async with sites.agent(B):
            await until_copied(sites, volume, inos)


async def test_the_journal_of_what_was_left_out_may_be_gone(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.mount(C) as (there, others), sites.agent(B) as agent:
        await until_walked(agent)
        way = Cut(sites, A)
        inos = [await save(here, b"a%d" % number, LARGE) for number in range(FILES)]
        await until_copied(sites, others, [await save(there, b"c", LARGE)])
        assert isinstance(sites.store, MemoryStore)
        await sites.store.compact((await sites.store.txn((), ())).revision)
        way.is_cut = False
        await until_copied(sites, volume, inos)


async def test_a_walk_goes_on_and_another_one_is_not_held_up(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume), sites.mount(C) as (there, others):
        inos = [await save(here, b"a%d" % number, LARGE) for number in range(FILES)]
        elsewhere = [await save(there, b"c%d" % number, LARGE) for number in range(FILES)]
        await volume.settle()
        await others.settle()
        way = Cut(sites, A)
        await sites.set_policy(SOON_B)
        async with sites.agent(B) as agent:
            await until_copied(sites, others, elsewhere)
            await sites.set_policy(Policy(soon=(B,), bound_s=7))  # is looked at though the first walk waits
            with trio.fail_after(60):
                while agent.progress.walked < 2 * FILES or agent.policies.by_number[1].bound_s != 7:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            assert not agent.state.walked
            assert len(agent.backlog) <= JOBS_MAX // 4
            way.is_cut = False
            await until_copied(sites, volume, inos)
            await until_done(agent)
