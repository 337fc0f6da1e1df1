"""The agent of a site: what policies ask for is copied there, whoever is killed, stopped or replaced meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import trio
import trio.testing

from apollofs.fs.agent.context import AgentContext
from apollofs.fs.agent.duties import DUTIES
from apollofs.fs.agent.feed import follow_policies
from apollofs.fs.agent.rates import ByteRate
from apollofs.fs.agent.report import report
from apollofs.fs.filesystem import Filesystem
from apollofs.fs.user_error import UserError
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO, RenameFlag
from apollofs.metadata.store import Delete, Put, Range
from tests.support.filesystems import LARGE, USER, content, save
from tests.support.retaining import write
from tests.support.sites import KEYS, OPTIONS_OF_AGENTS, SITES, A, B, C, Sites, sites, until_done
from tests.support.values import kv_client
from tests.support.volumes import VOLUME

__all__ = ["sites"]
SOON_B = Policy(soon=(B,))
FILES = 24
BLOCK_BYTES = 1 << 16
LARGE_RATE = 1 << 30


async def mkdir(filesystem: Filesystem, name: bytes, parent: int = ROOT_INO) -> int:
    return (await filesystem.mkdir(parent, name, 0o755, USER)).ino


async def test_what_is_committed_is_copied(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent:
        ino = await save(here, b"f", LARGE)
        await until_done(agent)
        assert await sites.copied_to(B, volume, ino)
        assert not await sites.objects(C)
        assert agent.progress.bytes == len(LARGE)
        async with sites.mount(B) as (there, _):
            sites.stop(A)
            assert await content(there) == LARGE


async def test_a_value_inherits_and_is_copied(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with kv_client(sites.store, sites.blobs[A]) as client, sites.agent(B) as agent:
        kv = await client.kv("/d", create=True)
        for number in range(2):
            await kv.put("k", LARGE + bytes([number]))
            await until_done(agent)
            assert agent.progress.bytes == (number + 1) * (len(LARGE) + 1)


async def test_where_blobs_are_is_asked_for_once_for_a_batch(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    asked = 0

    async def hook(moment: Moment, request: Request) -> None:
        nonlocal asked
        if moment is Moment.BEFORE and request.method in ("range", "txn"):
            questions = request.arguments if request.method == "range" else request.arguments[1]
            assert isinstance(questions, list | tuple)
            asked += any(isinstance(each, Range) and each.key.startswith(KEYS.table(b"b")) for each in questions)

    async with sites.mount(A) as (here, _):
        for number in range(FILES):
            await save(here, b"f%d" % number, LARGE)
        assert isinstance(sites.store, MemoryStore)
        async with sites.agent(B, store=sites.store.another(hook)) as agent:
            await until_done(agent)
            assert agent.progress.blobs == FILES
    assert asked < FILES // 2


async def test_who_has_no_policy_pays_nothing(sites: Sites) -> None:
    async with sites.mount(A) as (here, _), sites.agent(B) as agent:
        await save(here, b"f", LARGE)
        await until_done(agent)
        assert (agent.progress.files, await sites.objects(B)) == (0, set())


async def test_what_was_there_before_follows_and_inherits(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent:
        top = await mkdir(here, b"top")
        below = await mkdir(here, b"below", top)
        old = await save(here, b"old", LARGE)
        await here.rename(ROOT_INO, b"old", below, b"old", RenameFlag(0))
        outside = await save(here, b"outside", LARGE)
        await sites.set_policy(SOON_B, top)
        await until_done(agent)
        assert await sites.copied_to(B, volume, old)
        assert not await sites.copied_to(B, volume, outside)
        found = [(await volume.getattr(ino)).policy for ino in (top, below, old, outside)]
        assert found == [top, top, top, 0]


async def test_a_policy_within_another_is_left_alone_until_it_is_cleared(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume), sites.agent(B) as to_b, sites.agent(C) as to_c:
        top = await mkdir(here, b"top")
        inner = await mkdir(here, b"inner", top)
        await volume.settle()
        await sites.set_policy(Policy(soon=(C,)), inner)
        await sites.set_policy(SOON_B, top)
        ino = await save(here, b"f", LARGE)
        await here.rename(ROOT_INO, b"f", inner, b"f", RenameFlag(0))
        await sites.set_policy(Policy(soon=(C,), bound_s=5), inner)
        await until_done(to_b)
        await until_done(to_c)
        assert await sites.copied_to(C, volume, ino)
        assert not await sites.copied_to(B, volume, ino)
        await sites.set_policy(None, inner)
        await until_done(to_b)
        assert await sites.copied_to(B, volume, ino)
        assert (await volume.getattr(ino)).policy == top
        await sites.set_policy(None, top)
        assert (await volume.getattr(top)).policy == 0


async def test_a_successor_goes_on(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume):
        async with sites.agent(B) as first:
            await save(here, b"first", LARGE)
            await until_done(first)
        ino = await save(here, b"second", LARGE)
        async with sites.agent(B) as second:
            await until_done(second)
            assert await sites.copied_to(B, volume, ino)


async def copied_by_a_predecessor(sites: Sites, here: Filesystem) -> None:
    """A file that an agent of B has copied, and noted how far it has come, before it ended."""
    async with sites.agent(B) as first:
        await save(here, b"first", LARGE)
        await until_done(first)
        while not first.state.updated_ns:
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_successor_that_hears_of_the_policies_late_passes_nothing_over(sites: Sites) -> None:
    """Etcd may answer what it is asked in any order."""

    async def late(context: AgentContext) -> None:
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked(0.001)
        await follow_policies(context)

    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume):
        await copied_by_a_predecessor(sites, here)
        ino = await save(here, b"second", LARGE)
        duties = tuple(late if duty is follow_policies else duty for duty in DUTIES)
        async with sites.agent(B, duties=duties) as second:
            await until_done(second)
            assert await sites.copied_to(B, volume, ino)


async def test_one_of_many_candidates_is_the_agent(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume):
        async with trio.open_nursery() as nursery:
            async with sites.agent(B) as first:
                second = trio.Event()

                async def candidate() -> None:
                    async with sites.agent(B) as context:
                        second.set()
                        await until_done(context)

                nursery.start_soon(candidate)
                await until_done(first)
                assert not second.is_set()
            ino = await save(here, b"f", LARGE)
        assert await sites.copied_to(B, volume, ino)


async def test_a_store_that_is_down_is_waited_for(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent:
        sites.stop(B)
        ino = await save(here, b"f", LARGE)
        while not agent.progress.failures:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert len(agent.backlog) in (1, 2)  # the journal speaks of it, and the walk may too
        sites.stopped.clear()
        await until_done(agent)
        assert await sites.copied_to(B, volume, ino)


async def test_a_store_that_cant_be_opened_is_tried_again(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    sites.unopened[B] = UserError("the volume has no such site")
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent:
        ino = await save(here, b"f", LARGE)
        while not agent.progress.failures:
            await trio.testing.wait_all_tasks_blocked(0.001)
        sites.unopened.clear()
        await until_done(agent)
        assert await sites.copied_to(B, volume, ino)


async def test_all_copies_go_with_the_last_name(sites: Sites) -> None:
    await sites.set_policy(Policy(soon=(B, C)))
    async with sites.mount(A) as (here, volume), sites.agent(B) as to_b, sites.agent(C) as to_c:
        await save(here, b"f", LARGE)
        await save(here, b"kept", LARGE)
        await until_done(to_b)
        await until_done(to_c)
        await here.unlink(ROOT_INO, b"f")
        await volume.settle()
        report = await sites.collect()
        assert (report.dropped.blobs, report.errors) == (1, [])
        found = [await sites.objects(site) for site in (A, B, C)]
        assert found[0] == found[1] == found[2] and len(found[0]) == 1


async def test_a_copy_under_way_of_what_is_collected_is_taken_back(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent:
        arrived, go_on = trio.Event(), trio.Event()

        async def wait() -> None:
            arrived.set()
            await go_on.wait()

        sites.blobs[B].before_put = wait
        await save(here, b"f", LARGE)
        await arrived.wait()
        await here.unlink(ROOT_INO, b"f")
        await volume.settle()
        report = await sites.collect()
        assert (report.dropped.blobs, report.errors) == (1, [])
        go_on.set()
        await until_done(agent)
        assert [await sites.objects(site) for site in (A, B)] == [set(), set()]


async def test_what_is_read_afar_is_kept_where_the_policy_says_so(sites: Sites) -> None:
    await sites.set_policy(Policy(read=(B,)))
    async with sites.mount(A) as (here, volume), sites.agent(B) as agent, sites.mount(B) as (there, _):
        ino = await save(here, b"f", LARGE)
        await until_done(agent)
        assert not await sites.objects(B)
        assert await content(there) == LARGE
        while not agent.progress.blobs:
            await trio.testing.wait_all_tasks_blocked(0.001)
        await until_done(agent)
        assert await sites.copied_to(B, volume, ino)


async def test_what_a_reader_waits_for_does_not_wait_for_what_is_copied(sites: Sites) -> None:
    await sites.set_policy(Policy(read=(B,)))
    options = replace(OPTIONS_OF_AGENTS, workers=1, blocks_in_memory=1, bytes_per_s=LARGE_RATE)
    stuck, go_on = trio.Event(), trio.Event()

    async def hold_the_first() -> None:
        if not stuck.is_set():
            stuck.set()
            await go_on.wait()

    async with sites.mount(A) as (here, volume), sites.agent(B, options) as agent, sites.mount(B) as (there, _):
        directory = await mkdir(here, b"d")
        await sites.set_policy(SOON_B, directory)
        sites.blobs[B].before_put = hold_the_first
        await write(here, b"slow", LARGE, directory)
        await stuck.wait()
        ino = await save(here, b"f", LARGE)
        assert await content(there) == LARGE
        while not agent.progress.blobs:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert not go_on.is_set()
        go_on.set()
        await until_done(agent)
        assert await sites.copied_to(B, volume, ino)


async def test_a_bound_of_the_rate_holds_for_all_together(autojump_clock: trio.testing.MockClock) -> None:
    rate, done = ByteRate(100), dict[str, list[float]](first=[], others=[])

    async def move(name: str, turn: Callable[[int], Awaitable[None]]) -> None:
        for _ in range(5):
            await turn(100)
            done[name].append(autojump_clock.current_time())

    await trio.sleep(10)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, "others", rate.turn)
        await trio.sleep(0.5)
        nursery.start_soon(move, "first", rate.first_turn)
    first, others = [[time - began for time in done[name]] for name in ("first", "others")]
    assert first[-1] <= 4.5, "as if nobody else were there"
    assert others[-1] == 8.0, "a second for each, but for what was saved up"


async def test_a_large_file_that_many_nodes_read_comes_from_afar_once(sites: Sites) -> None:
    await sites.set_policy(Policy(read=(B,)))
    data = random.Random(1).randbytes(12 * BLOCK_BYTES + 5)
    async with AsyncExitStack() as stack:
        here, _ = await stack.enter_async_context(sites.mount(A))
        await save(here, b"small", LARGE)
        others = await sites.objects(A)
        await save(here, b"f", data)
        await stack.enter_async_context(sites.agent(B))
        nodes = [(await stack.enter_async_context(sites.mount(B)))[0] for _ in range(4)]
        for node in nodes:  # they know the policy from now on
            assert await content(node, b"small") == LARGE
        found: list[bytes] = []

        async def read(node: Filesystem) -> None:
            found.append(await content(node))

        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(read, node)
        assert found == [data] * len(nodes)
        reads = Counter(name for name, _, _ in sites.blobs[A].reads if name not in others)
        assert len(reads) == 13
        assert set(reads.values()) == {1}


async def test_a_large_file_that_no_agent_brings_is_read_from_afar(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apollofs.fs.arrivals.STALL_S", 0.2)
    await sites.set_policy(Policy(read=(B,)))
    data = random.Random(1).randbytes(12 * BLOCK_BYTES + 5)
    async with sites.mount(A) as (here, _), sites.agent(B, duties=()), sites.mount(B) as (there, _):
        await save(here, b"f", data)
        assert await content(there) == data


@pytest.mark.expects_log("can't be copied", "corrupt data")
async def test_what_is_damaged_everywhere_is_given_up_and_said(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollofs.fs.agent.copier.RETRY_FIRST_S", 0.0)
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, _):
        await save(here, b"f", LARGE)
        for name in await sites.objects(A):
            sites.blobs[A].corrupt(name)
        async with sites.agent(B) as agent:
            await until_done(agent)
            assert agent.progress.given_up == 1
            assert agent.counters()["agent"]["given_up"] == 1
            while not agent.state.facts.get("given_up"):
                await trio.testing.wait_all_tasks_blocked(0.001)
            told = {each["site"]: each["given_up"] for each in await report(sites.store, VOLUME)}
            assert told == {SITES[A - 1]: 0, SITES[B - 1]: 1, SITES[C - 1]: 0}
        assert not await sites.objects(B)


async def test_the_journal_that_is_gone_is_replaced_by_a_walk(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume):
        await copied_by_a_predecessor(sites, here)
        ino = await save(here, b"second", LARGE)
        found = await sites.store.txn((), ())
        await sites.store.compact(found.revision)  # type: ignore[attr-defined]
        async with sites.agent(B) as second:
            await until_done(second)
            assert await sites.copied_to(B, volume, ino)


@pytest.mark.expects_log("can't be copied")
async def test_records_that_do_not_decode_stop_nothing_else(sites: Sites) -> None:
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, volume):
        await copied_by_a_predecessor(sites, here)
        await save(here, b"inode", LARGE)
        ino = await save(here, b"copies", LARGE)
        blobs = {extent.blob for extent in (await volume.read_body(ino)).inode.extents}
        good = await save(here, b"good", LARGE)
        await volume.settle()
        name = KEYS.dentry(ROOT_INO, b"inode")
        was = (await sites.store.range(Range(name))).kvs[0].value
        copies = [KEYS.copies(blob) for blob in blobs]
        await sites.store.txn((), (Put(name, was[:-3]), *(Put(key, b"?") for key in copies)))
        async with sites.agent(B) as agent:
            with trio.fail_after(60):
                while agent.progress.given_up < 2 or not await sites.copied_to(B, volume, good):
                    await trio.testing.wait_all_tasks_blocked(0.001)
            assert agent.session.alive
        await sites.store.txn((), (Put(name, was), *(Delete(key) for key in copies)))
