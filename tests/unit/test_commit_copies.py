"""Commits that wait for other sites, of files that share a blob: it is copied once."""

from __future__ import annotations

from collections import Counter

import trio
import trio.testing

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.blobs import Block, open_blob_source
from apollofs.fs.commit_copies import CommitCopies
from apollofs.fs.errors import BodyUnavailable
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO, Extent
from tests.support.filesystems import close, create
from tests.support.sites import A, B, Sites, sites

__all__ = ["sites"]
FILES = 12
MEMBER = b"x" * 3000


class Gate:
    """Holds puts at a site until it is opened; how they end then."""

    def __init__(self, sites: Sites, site: int, error: Exception | None = None) -> None:
        self.arrived, self.open = trio.Event(), trio.Event()
        self._error = error
        sites.blobs[site].before_put = self._wait

    async def _wait(self) -> None:
        self.arrived.set()
        await self.open.wait()
        if self._error is not None:
            raise self._error


async def close_all(sites: Sites, gate: Gate) -> list[Exception]:
    """Files that are closed at the same time, and share a pack: how that failed for whom."""
    errors: list[Exception] = []
    async with sites.mount(A) as (here, _):
        handles = []
        for number in range(FILES):
            _, fh = await create(here, b"f%d" % number)
            await here.write(fh, 0, MEMBER)
            handles.append(fh)

        async def one(fh: int) -> None:
            try:
                await here.fsync(fh, data_only=False)
            except BodyUnavailable as exc:
                errors.append(exc)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for fh in handles:
                    nursery.start_soon(one, fh)
                await gate.arrived.wait()
                await trio.testing.wait_all_tasks_blocked(0.01)
                gate.open.set()
        sites.blobs[B].before_put = None
        for fh in handles:
            await close(here, fh)
    return errors


async def test_a_pack_is_copied_once(sites: Sites) -> None:
    await sites.set_policy(Policy(commit=(B,)))
    assert not await close_all(sites, Gate(sites, B))
    packs = await sites.objects(A)
    assert len(packs) < FILES, "some share a pack"
    assert Counter(sites.blobs[B].puts) == dict.fromkeys(packs, 1)


async def test_that_a_pack_is_not_copied_is_said_to_each(sites: Sites) -> None:
    await sites.set_policy(Policy(commit=(B,)))
    errors = await close_all(sites, Gate(sites, B, BlobStoreUnavailable("no way there")))
    assert len(errors) == FILES
    assert len({id(each) for each in errors}) == FILES, "an exception is raised once"


async def test_whoever_waits_takes_over_where_the_other_is_cancelled(sites: Sites) -> None:
    await sites.set_policy(Policy(commit=(B,)))
    gate, told = Gate(sites, B), list[object]()
    async with sites.mount(A) as (_, volume), open_blob_source(sites.open_store, len(MEMBER), A) as source:
        copies = CommitCopies(source, volume.placement, None)
        block = Block(volume.new_blob(), 0, len(MEMBER))
        await source.put_block(block, MEMBER)
        extent = Extent(0, len(MEMBER), block.blob, 0, len(MEMBER))

        async def settle(scope: trio.CancelScope) -> None:
            with scope:
                told.append(await copies.settle(ROOT_INO, [extent]))

        first, second = trio.CancelScope(), trio.CancelScope()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(settle, first)
                await gate.arrived.wait()
                nursery.start_soon(settle, second)
                await trio.testing.wait_all_tasks_blocked()
                first.cancel()
                gate.open.set()
        assert told == [((block.blob, (B,)),)]
        assert await sites.objects(B) == {block.name}
        await source.delete_block(block)
        await source.delete_block(block, B)
