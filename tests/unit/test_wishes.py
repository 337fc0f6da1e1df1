"""What mounts ask their site's agent for: bounded at both ends, and none of it forgotten."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from apollofs.fs.agent.backlog import JOBS_MAX, Backlog
from apollofs.fs.agent.context import AgentContext
from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import OutcomeUnknown
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Delete, Range, prefix_end
from tests.support.filesystems import LARGE, USER, close, content, save
from tests.support.sites import KEYS, A, B, Sites, sites, until_done

__all__ = ["sites"]
READ_B = Policy(read=(B,))
FILES = 30


async def wishes(sites: Sites) -> list[bytes]:
    prefix = KEYS.wanted_at(B)
    return [kv.key for kv in (await sites.store.range(Range(prefix, prefix_end(prefix), keys_only=True))).kvs]


async def read_all(there: Filesystem) -> None:
    for number in range(FILES):
        assert await content(there, b"f%d" % number) == LARGE
    await trio.testing.wait_all_tasks_blocked(0.01)


async def idle(_: AgentContext) -> None:
    """The duty of an agent that does nothing."""
    await trio.sleep_forever()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound of a mount's wishes."""
    monkeypatch.setattr("apollofs.fs.mount_sites.OUTSTANDING_MAX", 10)
    monkeypatch.setattr("apollofs.fs.mount_sites.LOOK_AGAIN_S", 0.0)
    return 10


async def test_where_there_is_no_agent_nothing_is_asked_for(sites: Sites) -> None:
    await sites.set_policy(READ_B)
    async with sites.mount(A) as (here, _), sites.mount(B) as (there, _):
        for number in range(FILES):
            await save(here, b"f%d" % number, LARGE)
        await read_all(there)
        assert not await wishes(sites)


async def test_wishes_of_a_mount_are_bounded(sites: Sites, few: int) -> None:
    await sites.set_policy(READ_B)
    async with sites.mount(A) as (here, _), sites.mount(B) as (there, _), sites.agent(B, duties=(idle,)):
        for number in range(FILES):
            await save(here, b"f%d" % number, LARGE)
        await read_all(there)
        first = await wishes(sites)
        assert len(first) == few
        await sites.store.txn((), [Delete(key) for key in first])  # as the agent does
        await read_all(there)
        second = await wishes(sites)
        assert len(second) == few
        assert not set(second) & set(first), "what was not asked for is, when it is opened again"


async def test_more_wishes_than_an_agent_looks_at_at_once(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backlog.__init__, "__defaults__", (JOBS_MAX, 3))
    monkeypatch.setattr("apollofs.fs.agent.feed.PAGE_KEYS", 4)
    await sites.set_policy(READ_B)
    async with sites.mount(A) as (here, volume), sites.mount(B) as (there, asking):
        inos = [await save(here, b"f%d" % number, LARGE) for number in range(FILES)]
        async with sites.agent(B, duties=(idle,)):
            for number, ino in enumerate(inos):
                await there.lookup(ROOT_INO, b"f%d" % number)
                assert await asking.placement.want_here(ino)
        async with sites.agent(B) as agent:
            most = 0
            with trio.fail_after(60):
                while await wishes(sites):
                    most = max(most, len(agent.backlog))
                    await trio.testing.wait_all_tasks_blocked(0.001)
            await until_done(agent)
            assert most <= 3
            for ino in inos:
                assert await sites.copied_to(B, volume, ino)


async def test_a_wish_that_comes_while_an_older_one_is_dealt_with_stays(sites: Sites) -> None:
    arrived, go_on, second = trio.Event(), trio.Event(), trio.Event()

    async def wait() -> None:
        if go_on.is_set():
            second.set()
            await trio.sleep_forever()
        arrived.set()
        await go_on.wait()

    await sites.set_policy(READ_B)
    async with sites.mount(A) as (here, _), sites.mount(B) as (there, asking), sites.agent(B):
        ino = await save(here, b"f", LARGE)
        await there.lookup(ROOT_INO, b"f")
        sites.blobs[B].before_put = wait
        assert await asking.placement.want_here(ino)
        with trio.fail_after(60):
            await arrived.wait()
            fh = (await here.open(ino, os.O_RDWR, USER)).fh
            await here.write(fh, 0, LARGE[::-1])
            await close(here, fh)
            assert await asking.placement.want_here(ino)
            go_on.set()
            await second.wait()
        assert len(await wishes(sites)) == 1


@pytest.mark.parametrize("lost", list(Moment))
async def test_an_answer_of_etcd_that_is_lost_ends_no_term(sites: Sites, lost: Moment) -> None:
    lost_answers = 0

    async def hook(moment: Moment, request: Request) -> None:
        nonlocal lost_answers
        writes = request.arguments[1] if request.method == "txn" else ()
        assert isinstance(writes, list | tuple)
        forgets = any(isinstance(each, Delete) and each.key.startswith(KEYS.wanted_at(B)) for each in writes)
        if moment is lost and forgets and not lost_answers:
            lost_answers += 1
            raise OutcomeUnknown("no answer in time")

    await sites.set_policy(READ_B)
    assert isinstance(sites.store, MemoryStore)
    async with (
        sites.mount(A) as (here, volume),
        sites.mount(B) as (there, _),
        sites.agent(B, store=sites.store.another(hook)) as agent,
    ):
        ino = await save(here, b"f0", LARGE)
        assert await content(there, b"f0") == LARGE
        with trio.fail_after(60):
            while not lost_answers or await wishes(sites):
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert await sites.copied_to(B, volume, ino)
        await until_done(agent)
        assert agent.session.alive
