"""Walks of the trees that have a policy, and what happens while they are under way."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.fs.agent.context import AgentContext
from apollofs.fs.agent.duties import DUTIES
from apollofs.fs.agent.feed import follow_journal
from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import NoSuchEntry
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO, RenameFlag
from apollofs.metadata.store import Put, Range
from apollofs.metadata.volume import Volume
from tests.support.filesystems import LARGE, USER, save
from tests.support.sites import KEYS, A, B, C, Sites, sites, until_done

__all__ = ["sites"]
SOON_B, SOON_C = Policy(soon=(B,)), Policy(soon=(C,))


async def mkdir(filesystem: Filesystem, name: bytes, parent: int = ROOT_INO) -> int:
    return (await filesystem.mkdir(parent, name, 0o755, USER)).ino


async def nested(here: Filesystem, volume: Volume) -> tuple[int, int, int, int]:
    """`top/inner/sub/f`: their numbers. None has a policy."""
    top = await mkdir(here, b"top")
    inner = await mkdir(here, b"inner", top)
    sub = await mkdir(here, b"sub", inner)
    file = await save(here, b"f", LARGE)
    await here.rename(ROOT_INO, b"f", sub, b"f", RenameFlag(0))
    await volume.settle()
    return top, inner, sub, file


async def policies_of(volume: Volume, *inos: int) -> list[int]:
    return [(await volume.getattr(ino)).policy for ino in inos]


async def test_a_number_is_handed_down_from_the_directory_alone(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume):
        top, inner, sub, file = await nested(here, volume)
        await sites.set_policy(SOON_B, top)
        await sites.set_policy(SOON_C, inner)
        give = volume.placement.inherit_policy
        assert not await give(file, (sub, b"f"), inner), "not before its directory"
        assert await give(sub, (inner, b"sub"), inner)
        assert await give(file, (sub, b"f"), inner)
        for ino, location in ((inner, (top, b"inner")), (sub, (inner, b"sub")), (file, (sub, b"f"))):
            assert not await give(ino, location, top)
        assert await policies_of(volume, inner, sub, file) == [inner] * 3


async def test_a_number_is_handed_down_to_what_moves(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume):
        top, inner, sub, file = await nested(here, volume)
        await sites.set_policy(SOON_B, top)
        give = volume.placement.inherit_policy
        await here.rename(sub, b"f", top, b"g", RenameFlag(0))
        await here.rename(inner, b"sub", ROOT_INO, b"sub", RenameFlag(0))
        await volume.settle()
        assert await give(file, (sub, b"f"), top), "it is in `top` by now"
        assert not await give(sub, (inner, b"sub"), top), "it is not any more"


async def test_a_number_is_handed_down_to_a_file_where_it_was_seen_by_one_of_its_names(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume):
        top, _, sub, file = await nested(here, volume)
        await volume.link(file, top, b"link")
        await sites.set_policy(SOON_B, top)
        give = volume.placement.inherit_policy
        assert not await give(file, (sub, b"f"), top)
        assert await give(file, (top, b"link"), top)
        gone = await mkdir(here, b"gone")
        await here.rmdir(ROOT_INO, b"gone")
        await volume.settle()
        with pytest.raises(NoSuchEntry):
            await give(file, (gone, b"f"), sub)


async def test_a_walk_leaves_out_what_was_given_a_policy_meanwhile(sites: Sites) -> None:
    listing, go_on = trio.Event(), trio.Event()

    async def hold(moment: Moment, request: Request) -> None:
        asked = request.arguments[1] if request.method == "txn" else request.arguments[:1]
        assert isinstance(asked, list | tuple)
        names = KEYS.dentries_of(inner)
        if moment is Moment.BEFORE and any(isinstance(op, Range) and op.key.startswith(names) for op in asked):
            listing.set()
            await go_on.wait()

    async with sites.mount(A) as (here, volume):
        top, inner, sub, file = await nested(here, volume)
        await sites.set_policy(SOON_B, top)
        assert isinstance(sites.store, MemoryStore)
        async with sites.agent(B, store=sites.store.another(hold)) as to_b:
            await listing.wait()  # it has found that `inner` is `top`'s
            sites.stop(A)
            await sites.set_policy(SOON_C, inner)
            async with sites.agent(C) as to_c:
                while not to_c.progress.failures:  # it has walked `inner`, and can't copy yet
                    await trio.testing.wait_all_tasks_blocked(0.001)
                go_on.set()
                with trio.fail_after(60):
                    while top not in to_b.state.walked:
                        await trio.testing.wait_all_tasks_blocked(0.001)
                assert await policies_of(volume, inner, sub, file) == [inner] * 3
                sites.stopped.clear()
                await until_done(to_b)
                await until_done(to_c)
        assert await sites.copied_to(C, volume, file)
        assert not await sites.objects(B)


async def test_a_walk_does_not_count_for_a_journal_that_is_followed_from_later_on(sites: Sites) -> None:
    """What was committed between the two is seen by neither."""
    between: list[int] = []

    async def late(context: AgentContext) -> None:
        while not context.progress.failures:  # the root has been listed, and what was found can't be copied yet
            await trio.testing.wait_all_tasks_blocked(0.001)
        between.append(await save(there, b"between", LARGE))
        await follow_journal(context)

    duties = tuple(late if duty is follow_journal else duty for duty in DUTIES)
    await sites.set_policy(SOON_B)
    async with sites.mount(A) as (here, _), sites.mount(C) as (there, volume):
        await save(here, b"before", LARGE)
        sites.stop(A)
        async with sites.agent(B, duties=duties) as agent:
            while not agent.state.position:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert agent.progress.walking
            sites.stopped.clear()
            await save(there, b"after", LARGE)
            await until_done(agent)
            assert await sites.copied_to(B, volume, between[0])


@pytest.mark.expects_log("can't be copied")
async def test_a_record_that_does_not_decode_does_not_stop_a_walk(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume):
        _, _, sub, _ = await nested(here, volume)
        good = await save(here, b"good", LARGE)
        beside = await save(here, b"beside", LARGE)
        await here.rename(ROOT_INO, b"beside", sub, b"beside", RenameFlag(0))
        await volume.settle()
        name = KEYS.dentry(sub, b"f")
        was = (await sites.store.range(Range(name))).kvs[0].value
        await sites.store.txn((), (Put(name, was[:-3]),))
        await sites.set_policy(SOON_B)
        async with sites.agent(B) as agent:
            await until_done(agent)
            assert agent.progress.given_up == 1
            for ino in (good, beside):
                assert await sites.copied_to(B, volume, ino)
        await sites.store.txn((), (Put(name, was),))
