"""Reads across sites: the nearest first, another one where that fails or is slow; commits that wait for sites."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreError, BlobStoreRefused, BlobStoreUnavailable, BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.arrivals import EXPECTED_S, STALL_S, Arrivals
from apollofs.fs.blobs import BlobSource, Block, open_blob_source
from apollofs.fs.errors import BodyUnavailable, MissingBlob
from apollofs.fs.nearness import REST_FIRST_S, Nearness
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import StoreUnavailable
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.replicas import Replicas
from tests.support.bodies import BrokenBlobs
from tests.support.filesystems import LARGE, close, content, create, save
from tests.support.sites import KEYS, A, B, C, Sites, sites

__all__ = ["sites"]
BLOCK = Block(A << 56 | 1, 0, 3)
UNOPENED = (StoreUnavailable("etcd does not say where it is"), UserError("the volume has no such site"))


class Stores:
    """Three stores, the block at the first two of them."""

    def __init__(self) -> None:
        self.blobs = {site: BrokenBlobs(MemoryBlobs()) for site in (A, B, C)}
        self.asked = 0

    async def open(self, site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return self.blobs[site]

    async def copies_of(self, blob: int) -> tuple[int, ...]:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return (B,)

    async def fill(self, source: BlobSource) -> None:
        await source.put_block(BLOCK, b"one")
        await source.put_block(BLOCK, b"one", B)

    def reads(self) -> dict[int, int]:
        return {site: len(blobs.reads) for site, blobs in self.blobs.items()}


@pytest.mark.parametrize("here", [A, B])
async def test_a_block_is_read_at_home_if_it_is_there(here: int) -> None:
    stores = Stores()
    async with open_blob_source(stores.open, 64, here, stores.copies_of) as source:
        await stores.fill(source)
        assert bytes(await source.read_block(BLOCK)) == b"one"
        assert stores.reads() == {A: here == A, B: here == B, C: 0}
        assert stores.asked == (here == B)


async def test_what_is_being_brought_is_waited_for_at_this_site(autojump_clock: trio.testing.MockClock) -> None:
    stores, arrivals = Stores(), Arrivals()
    async with open_blob_source(stores.open, 64, B, stores.copies_of, arrivals) as source:
        await source.put_block(BLOCK, b"one")
        arrivals.expect([BLOCK.blob])

        async def bring() -> None:
            await trio.sleep(STALL_S - 1)
            await source.put_block(BLOCK, b"one", B)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring)
            assert bytes(await source.read_block(BLOCK)) == b"one"
        assert not stores.blobs[A].reads
        await trio.sleep(EXPECTED_S + 1)
        assert not arrivals.expects(BLOCK.blob)


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_store_that_does_not_answer_is_waited_for_once(
    hangs: bool, autojump_clock: trio.testing.MockClock
) -> None:
    stores, arrivals = Stores(), Arrivals()
    blobs = [BLOCK, Block(A << 56 | 2, 0, 3)]

    async def refuse() -> None:
        if hangs:
            await trio.sleep_forever()
        raise BlobStoreUnavailable("down")

    async with open_blob_source(stores.open, 64, B, stores.copies_of, arrivals) as source:
        for block in blobs:
            await source.put_block(block, b"one")
        arrivals.expect([block.blob for block in blobs])
        stores.blobs[B].before_read = refuse
        began = autojump_clock.current_time()
        for block in blobs:
            assert bytes(await source.read_block(block)) == b"one"
        assert autojump_clock.current_time() - began < 2 * STALL_S, "once, and not for each blob"


@pytest.mark.parametrize("error", [BlobStoreUnavailable("down"), BlobStoreRefused("no")])
async def test_another_site_is_asked_where_one_fails(error: BlobStoreError) -> None:
    stores = Stores()
    async with open_blob_source(stores.open, 64, A, stores.copies_of) as source:
        await stores.fill(source)
        stores.blobs[A].fail_reads = [error] * 9
        assert bytes(await source.read_block(BLOCK)) == b"one"
        assert not source.nearness.is_well(A)
        before = stores.reads()[A]
        assert bytes(await source.read_block(BLOCK, 1, 1)) == b"n"
        assert stores.reads()[A] == before, "a site in trouble is not asked first"


@pytest.mark.expects_log("missing at site 1, and was read elsewhere")
async def test_a_lost_object_is_read_elsewhere() -> None:
    stores = Stores()
    async with open_blob_source(stores.open, 64, A, stores.copies_of) as source:
        await stores.fill(source)
        await source.delete_block(BLOCK)
        assert bytes(await source.read_block(BLOCK)) == b"one"


async def test_a_silent_store_costs_one_delay(autojump_clock: trio.testing.MockClock) -> None:
    stores = Stores()
    async with open_blob_source(stores.open, 64, A, stores.copies_of) as source:
        await stores.fill(source)
        stores.blobs[A].before_read = trio.sleep_forever
        with trio.fail_after(5):
            assert bytes(await source.fetch_block(BLOCK, lambda data, _: bytes(data))) == b"one"
        began = trio.current_time()
        assert bytes(await source.read_block(BLOCK)) == b"one"
        assert trio.current_time() == began, "the second read goes to the other site at once"
        stores.blobs[A].before_read = None
        await trio.sleep(REST_FIRST_S * 4)
        await source.read_block(BLOCK)
        assert source.nearness.is_well(A), "one reader finds that it is back"


async def test_the_gravest_error_is_raised() -> None:
    stores = Stores()
    async with open_blob_source(stores.open, 64, A, stores.copies_of) as source:
        with pytest.raises(MissingBlob):
            await source.read_block(BLOCK)
        stores.blobs[B].fail_reads = [BlobStoreRefused("no")] * 9
        with pytest.raises(BodyUnavailable):
            await source.read_block(BLOCK)


async def test_sites_are_ordered_by_what_they_take(autojump_clock: trio.testing.MockClock) -> None:
    near = Nearness(A)
    assert near.order([C, B, A])[0] == A
    near.answered(A, 0.01, 0)
    near.answered(B, 0.3, 0)
    near.answered(C, 0.1, 0)
    assert near.order([B, C, A]) == [A, C, B]
    near.troubled(A, "down")
    assert near.order([B, C, A]) == [C, B, A]
    await trio.sleep(REST_FIRST_S + 1)
    assert near.order([B, C, A]) == [A, C, B], "one reader tries"
    assert near.order([B, C, A]) == [C, B, A], "and the others do not"
    near.answered(A, 0.01, 0)
    assert near.order([B, C, A]) == [A, C, B]


# -- commits that wait for other sites --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy(commit=(B,)), Policy(commit_any=2)])
async def test_a_commit_returns_when_the_sites_have_it(sites: Sites, policy: Policy) -> None:
    await sites.set_policy(policy)
    async with sites.mount(A) as (here, volume):
        for name in (b"first", b"second"):  # the second time the policy is known, and the blocks go there at once
            ino = await save(here, name, LARGE * 20)
            assert await sites.copied_to(B, volume, ino)
        assert not sites.blobs[B].reads
        assert (await sites.collect()).errors == []
        async with sites.mount(B) as (there, _):
            sites.stop(A)
            assert await content(there, b"second") == LARGE * 20


async def test_of_any_n_sites_one_may_be_down(sites: Sites) -> None:
    await sites.set_policy(Policy(commit_any=2))
    sites.stop(B)
    async with sites.mount(A) as (here, volume):
        for name in (b"first", b"second"):
            ino = await save(here, name, LARGE)
            assert await sites.copied_to(C, volume, ino)


@pytest.mark.parametrize("error", UNOPENED)
async def test_of_any_n_sites_one_may_have_a_store_that_cant_be_opened(sites: Sites, error: Exception) -> None:
    await sites.set_policy(Policy(commit_any=2))
    sites.unopened[B] = error
    async with sites.mount(A) as (here, volume):
        for name in (b"first", b"second"):
            ino = await save(here, name, LARGE)
            assert await sites.copied_to(C, volume, ino)


async def test_of_any_n_sites_one_may_hang(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlobSource, "haste_s", 0.05)
    await sites.set_policy(Policy(commit_any=2))
    sites.blobs[B].before_put = trio.sleep_forever
    async with sites.mount(A) as (here, volume):
        for name in (b"first", b"second"):
            ino = await save(here, name, LARGE)
            assert await sites.copied_to(C, volume, ino)


async def test_of_any_n_sites_slow_ones_are_waited_for_where_none_is_quick(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlobSource, "haste_s", 0.05)
    await sites.set_policy(Policy(commit_any=3))
    tried, quick = 0, trio.Event()

    async def wait() -> None:
        nonlocal tried
        tried += 1
        if tried > 2:
            quick.set()  # both were given up once
        await quick.wait()

    sites.blobs[B].before_put = sites.blobs[C].before_put = wait
    async with sites.mount(A) as (here, volume):
        ino = await save(here, b"f", LARGE)
        assert await sites.copied_to(B, volume, ino)
        assert await sites.copied_to(C, volume, ino)


@pytest.mark.expects_log("could not be committed")
async def test_a_commit_fails_where_a_named_site_is_down(sites: Sites) -> None:
    await sites.set_policy(Policy(commit=(B,)))
    async with sites.mount(A) as (here, volume):
        _, fh = await create(here)
        await here.write(fh, 0, LARGE)
        sites.stop(B)
        with pytest.raises(BodyUnavailable):
            await here.fsync(fh, data_only=False)
        sites.stopped.clear()
        await here.fsync(fh, data_only=False)
        await close(here, fh)
        found = await here.lookup(ROOT_INO, b"f")
        assert await sites.copied_to(B, volume, found.ino)


@pytest.mark.expects_log("could not be committed")
@pytest.mark.parametrize(("error", "told"), [(UNOPENED[0], StoreUnavailable), (UNOPENED[1], BodyUnavailable)])
async def test_a_commit_fails_while_the_store_of_a_named_site_cant_be_opened(
    sites: Sites, error: Exception, told: type[Exception]
) -> None:
    await sites.set_policy(Policy(commit=(B,)))
    async with sites.mount(A) as (here, volume):
        _, fh = await create(here)
        await here.write(fh, 0, LARGE)
        sites.unopened[B] = error
        with pytest.raises(told):
            await here.fsync(fh, data_only=False)
        sites.unopened.clear()
        await here.fsync(fh, data_only=False)
        await close(here, fh)
        assert await sites.copied_to(B, volume, (await here.lookup(ROOT_INO, b"f")).ino)


async def test_a_commit_keeps_what_agents_have_noted(sites: Sites) -> None:
    """A blob that is committed again, by a later fsync, has a copy at another site by then."""
    await sites.set_policy(Policy(commit=(B,), soon=(C,)))
    async with sites.mount(A) as (here, volume), sites.agent(C) as agent:
        _, fh = await create(here)
        await here.write(fh, 0, LARGE)
        await here.fsync(fh, data_only=False)
        while not agent.progress.blobs:
            await trio.testing.wait_all_tasks_blocked(0.001)
        await here.write(fh, 0, b"x")
        await close(here, fh)
        body = await volume.read_body((await here.lookup(ROOT_INO, b"f")).ino)
        first = next(extent.blob for extent in body.inode.extents if extent.length > 1)
        assert (await Replicas(sites.store, KEYS).read([first]))[first].complete == (B, C)


async def test_small_files_that_share_an_object_wait_too(sites: Sites) -> None:
    await sites.set_policy(Policy(commit=(C,)))
    async with sites.mount(A) as (here, volume), trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(save, here, b"f%d" % number, bytes([number]) * 1000)
    async with sites.mount(A) as (here, volume):
        for number in range(12):
            ino = (await here.lookup(ROOT_INO, b"f%d" % number)).ino
            assert await sites.copied_to(C, volume, ino)
