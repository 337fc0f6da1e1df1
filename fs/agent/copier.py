"""The copier: brings what policies ask for to this site, a batch of files at a time.

A batch goes through these steps; whatever ends it between two of them, the next agent begins with it anew, finds what
is done, and puts the same objects under the same names:

1. the inodes are read, and of their blobs where each is (one request each);
2. the copies that are missing are announced (one transaction; `metadata/replicas.py` has the rules);
3. blocks are fetched from wherever they are nearest, and put; where a blob is at one site only, and that can't be read,
   this is not even tried: the file waits until somebody has seen that the site is back (`away.py`);
4. the copies are noted as complete (one transaction). A blob that was collected meanwhile is removed here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.agent.away import RETRY_FIRST_S, RETRY_MAX_S, watch_site
from apollofs.fs.agent.backlog import MOVED, WANTED, Job
from apollofs.fs.agent.context import AgentContext
from apollofs.fs.agent.finding import Found, find_bodies
from apollofs.fs.blob_copies import copy_blob, note_copies, referred_blocks, remove_copy
from apollofs.fs.blobs import Block, block_of, site_of
from apollofs.fs.errors import BodyError, CorruptBody
from apollofs.fs.user_error import UserError
from apollofs.fs.workers import share_out
from apollofs.metadata.copies import Copies
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.replicas import Referent
from apollofs.metadata.session import retry
from apollofs.metadata.store import Compare, Delete, Relation, Target

log = logging.getLogger(__name__)
BLOBS_AT_ONCE = 16
"""Of one batch; how many blocks are in memory is bounded apart from that."""
BATCH_MAX = 30
"""Files that share their requests."""
FORGET_S = 30.0
GIVE_UP_AFTER = 3
"""Attempts after which a body that is damaged or missing everywhere is left to the next walk."""

Watch = Callable[[Block], None]
"""Has `watch_site` look when the site of this block is back."""


@dataclass(slots=True)
class _Blob:
    """A blob that is to be copied, and for which jobs."""

    length: int
    referent: Referent
    jobs: list[Job]
    referred: set[int] = field(default_factory=set)


async def copy(context: AgentContext) -> None:
    """The duty: work off the backlog until cancelled. Raises SessionLost, StoreError."""
    async with trio.open_nursery() as nursery:

        def watch(block: Block) -> None:
            nursery.start_soon(watch_site, context, block)

        nursery.start_soon(_work, context, watch, WANTED)
        for _ in range(context.options.workers):
            nursery.start_soon(_work, context, watch, MOVED)


async def _work(context: AgentContext, watch: Watch, rank_max: int) -> None:
    """One is there for what readers wait for alone: it never waits for a batch of other files to be done."""
    while True:
        jobs = await context.backlog.take(BATCH_MAX, rank_max)
        await _Batch(context, jobs, watch).run()


class _Batch:
    def __init__(self, context: AgentContext, jobs: Sequence[Job], watch: Watch) -> None:
        self._context = context
        self._jobs = jobs
        self._watch = watch
        self._failed: dict[Job, Exception] = {}

    async def run(self) -> None:
        context = self._context
        found = self._sound(await find_bodies(context.store, context.keys, self._jobs))
        blobs = self._wanted_blobs(found)
        known = await self._read_copies(blobs)
        blobs = {blob: each for blob, each in blobs.items() if blob in known}
        here = context.site.id
        lacking = {
            blob: each
            for blob, each in blobs.items()
            if here not in known[blob].complete and (known[blob].complete or not self._is_away(blob, each))
        }
        for blob in lacking:
            context.known_copies.note(blob, known[blob].complete)  # or each would be asked for again to be read
        announced = await context.replicas.begin(
            context.session, here, {blob: (known[blob], each.referent) for blob, each in lacking.items()}
        )
        for blob in lacking.keys() - announced.keys():
            self._again(lacking[blob].jobs, _Changed())
        copied = await self._copy_all({blob: lacking[blob] for blob in announced})
        await self._finish({blob: announced[blob] for blob in copied}, lacking)
        await self._settle(found)

    # -- what is to be copied ----------------------------------------------------------------------------------------

    def _sound(self, found: dict[Job, Found | CorruptRecord]) -> dict[Job, Found]:
        """Those whose records decode; the others are given up."""
        for job, body in found.items():
            if isinstance(body, CorruptRecord):
                self._again([job], body)
        return {job: body for job, body in found.items() if isinstance(body, Found)}

    async def _read_copies(self, blobs: dict[int, _Blob]) -> dict[int, Copies]:
        """Where these blobs are; those of which that does not decode are given up."""
        try:
            return await self._context.replicas.read(blobs)
        except CorruptRecord:
            known: dict[int, Copies] = {}
        for number, blob in blobs.items():
            try:
                known |= await self._context.replicas.read([number])
            except CorruptRecord as exc:
                self._again(blob.jobs, exc)
        return known

    def _wanted_blobs(self, found: dict[Job, Found]) -> dict[int, _Blob]:
        blobs: dict[int, _Blob] = {}
        size = self._context.source.block_bytes
        for job, body in found.items():
            for extent in body.extents:
                if self._wants(job, body, site_of(extent.blob)):
                    blob = blobs.setdefault(extent.blob, _Blob(extent.blob_length, body.referent, []))
                    if job not in blob.jobs:
                        blob.jobs.append(job)
                        blob.referred |= referred_blocks(extent.blob, body.extents, size)
        return blobs

    def _wants(self, job: Job, body: Found, home: int) -> bool:
        here = self._context.site.id
        if home == here:
            return False
        policy = self._context.policies.of(body.policy)
        return job.rank == WANTED or (policy is not None and policy.wants_copy(here, home, self._context.sites))

    def _is_away(self, number: int, blob: _Blob) -> bool:
        """Whether its site can't be read: then its files are put off."""
        if site_of(number) not in self._context.backlog.away:
            return False
        self._again(blob.jobs, self._out_of_reach(number, blob))
        return True

    def _out_of_reach(self, number: int, blob: _Blob) -> _OutOfReach:
        return _OutOfReach(block_of(number, blob.length, min(blob.referred), self._context.source.block_bytes))

    # -- copying -----------------------------------------------------------------------------------------------------

    async def _copy_all(self, blobs: dict[int, _Blob]) -> list[int]:
        """Those of which everything is here now."""
        done: list[int] = []
        wanted = self._jobs[0].rank == WANTED
        limits = self._context.first_limits if wanted else self._context.limits

        async def one(item: tuple[int, _Blob]) -> None:
            number, blob = item
            context = self._context
            try:
                size_bytes = await copy_blob(
                    context.source, number, blob.length, blob.referred, context.site.id, limits
                )
            except (BodyError, BlobStoreError, UserError) as exc:
                is_out = not isinstance(exc, CorruptBody) and not context.source.nearness.is_well(site_of(number))
                self._again(blob.jobs, self._out_of_reach(number, blob) if is_out else exc)
            else:
                context.progress.copied(1, size_bytes)
                done.append(number)

        await share_out(one, blobs.items(), BLOBS_AT_ONCE)
        return done

    async def _finish(self, copied: dict[int, Copies], blobs: dict[int, _Blob]) -> None:
        """Note the copies; remove those of blobs that are gone."""
        context, here = self._context, self._context.site.id

        async def remove(blob: int) -> None:
            await self._remove(blob, blobs[blob])

        for blob in await note_copies(context.replicas, context.session, here, copied, remove):
            self._again(blobs[blob].jobs, _Changed())

    async def _remove(self, number: int, blob: _Blob) -> None:
        try:
            await remove_copy(self._context.source, number, blob.length, self._context.site.id)
        except (BodyError, BlobStoreError, UserError) as exc:
            log.info("a copy of blob %#x, which is gone, is left to `gc`: %s", number, exc)

    # -- what becomes of the jobs ------------------------------------------------------------------------------------

    def _again(self, jobs: Sequence[Job], why: Exception) -> None:
        for job in jobs:
            self._failed.setdefault(job, why)

    async def _settle(self, found: dict[Job, Found]) -> None:
        context, done = self._context, list[Job]()
        for job in self._jobs:
            why = self._failed.get(job)
            if isinstance(why, _OutOfReach):
                context.progress.failures += 1
                if context.backlog.put_off(job, site_of(why.block.blob)):
                    self._watch(why.block)
                continue
            if why is not None and not self._gives_up(job, why):
                context.progress.failures += 1
                pause_s = 0.0 if isinstance(why, _Changed) else RETRY_FIRST_S * 2 ** min(job.attempts, 10)
                context.backlog.again(job, min(pause_s, RETRY_MAX_S))
                continue
            context.progress.files += 1
            done.append(job)
            context.backlog.done(job)
            if job in found:
                self._note_lag(job, found[job])
        await self._forget_wishes([job for job in done if job.wish])

    def _gives_up(self, job: Job, why: Exception) -> bool:
        if not isinstance(why, CorruptRecord) and (job.attempts < GIVE_UP_AFTER or not isinstance(why, CorruptBody)):
            return False
        self._context.progress.given_up += 1
        log.error("inode %#x can't be copied: %s", job.ino, why)
        return True

    def _note_lag(self, job: Job, body: Found) -> None:
        progress, policy = self._context.progress, self._context.policies.of(body.policy)
        if job.revision and policy is not None:
            progress.lag_s = max(0.0, time.time() - job.since_ns / 1e9)
            progress.late += progress.lag_s > policy.bound_s

    async def _forget_wishes(self, jobs: Sequence[Job]) -> None:
        """Nobody waits any more: it is here, has no name, or can't be had. Who asks again meanwhile is heard again."""
        if jobs and not await self._forget(jobs) and len(jobs) > 1:
            for job in jobs:
                await self._forget([job])

    async def _forget(self, jobs: Sequence[Job]) -> bool:
        """Whether all these wishes were the newest."""
        context, here = self._context, self._context.site.id
        wishes = {context.keys.wanted(here, job.ino): job.wish for job in jobs}
        compares = [Compare(context.keys.agent(here), Target.LEASE, Relation.EQUAL, context.session.lease_id)]
        compares += [Compare(key, Target.MOD, Relation.EQUAL, revision) for key, revision in wishes.items()]
        deletes = [Delete(key) for key in wishes]
        return (await retry(lambda: context.store.txn(compares, deletes), FORGET_S)).succeeded


class _OutOfReach(BodyError):
    """The file's bytes are at a site that can't be read."""

    def __init__(self, block: Block) -> None:
        super().__init__(f"site {site_of(block.blob)} can't be read")
        self.block = block


class _Changed(BodyError):
    """The file, or where its blobs are, has changed since it was read: it is read again."""
