"""A policy that was set or changed moves what is there already: its tree is walked, once for each change.

What was created before the policy was set gets its number on the way, directories before what is in them is listed, so
that whatever comes later inherits it. Subtrees that have a policy of their own are left out, those too that were given
one after the walk had begun: each transaction compares that the directory above still has the number.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import trio

from apollofs.fs.agent.backlog import MOVED, Job, Walk
from apollofs.fs.agent.context import AgentContext
from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord, NoSuchEntry, StaleInode
from apollofs.metadata.listing import PAGE_KEYS, listed
from apollofs.metadata.name_text import name_text
from apollofs.metadata.records import DirectoryEntry
from apollofs.metadata.session import SessionOptions, retry
from apollofs.metadata.store import Range, prefix_end
from apollofs.metadata.volume import Volume, open_volume

log = logging.getLogger(__name__)
READ_S = 30.0
TAGS_AT_ONCE = 64
"""They share transactions."""


async def move(context: AgentContext) -> None:
    """The duty: walk the trees of policies that have changed since they were last walked, until cancelled."""
    waiting: dict[int, _Walked] = {}
    async with trio.open_nursery() as nursery:
        while True:
            changed, state, live = context.policies.changed, context.state, context.policies
            due = [
                number
                for number, revision in live.revisions.items()
                if state.walked.get(number) != revision
                and not (number in waiting and waiting[number].counts(revision, state.walked))
            ]
            if not due:
                await changed.wait()
                continue
            async with _tagging(context) as volume:
                for number in due:
                    walked = _Walked(live.revisions.get(number, 0), state.walked)
                    walk = await _TreeWalk(context, volume, number).run()
                    if walk.open or walk.left_out:
                        waiting[number] = walked
                        nursery.start_soon(_wait_for_sites, context, number, walk, waiting)
                    else:
                        walked.into[number] = walked.revision
            for number in state.walked.keys() - live.revisions.keys():
                del state.walked[number]


@dataclass(eq=False, frozen=True, slots=True)
class _Walked:
    """Which state of a policy a walk is of, and where that is noted: another mapping if the journal is lost meanwhile,
    and then the walk does not count."""

    revision: int
    into: dict[int, int]

    def counts(self, revision: int, into: dict[int, int]) -> bool:
        return self.revision == revision and self.into is into


async def _wait_for_sites(context: AgentContext, number: int, walk: Walk, waiting: dict[int, _Walked]) -> None:
    """All of a tree but what is at sites that can't be read has its copies. If too much was put off to be kept in
    memory, the tree is walked again when these are back; other trees are not held up."""
    walked = waiting[number]
    await walk.wait(0)
    await context.backlog.reachable(walk.left_out)
    if context.progress.walking == number:
        context.progress.walking = 0
    if not walk.left_out:
        walked.into[number] = walked.revision
    if waiting.get(number) is walked:
        del waiting[number]
    context.policies.changed_now()


@asynccontextmanager
async def _tagging(context: AgentContext) -> AsyncIterator[Volume]:
    """Changes inodes as a mount does: others' delegations are recalled."""
    options = SessionOptions(slots=16, delegations=False, write_back=False)
    record = replace(context.record, session=0)
    async with open_volume(context.store, context.keys.volume, context.site.name, options, record) as volume:
        yield volume


class _TreeWalk:
    def __init__(self, context: AgentContext, volume: Volume, number: int) -> None:
        self._context = context
        self._volume = volume
        self._number = number
        self._walk = Walk()
        self._began_ns = time.time_ns()

    async def run(self) -> Walk:
        """Returns when everything that was found has its copies, or waits for a site that can't be read. Raises
        SessionLost, DeadlineExceeded, StoreError."""
        progress, found = self._context.progress, self._walk
        progress.walking, progress.walked = self._number, 0
        left = [self._number]
        while left:
            left += await self._list(left.pop())
        await found.wait()
        if found.open or found.left_out:
            log.info("the tree of policy %#x waits for sites that can't be read", self._number)
        else:
            progress.walking = 0
            log.info("the tree of policy %#x is as it should be here: %d files", self._number, progress.walked)
        return found

    async def _list(self, directory: int) -> list[int]:
        """The files of a directory become jobs; its subdirectories are returned. A name whose record does not decode
        is given up."""
        below: list[int] = []
        # read as a mount reads: what others hold exclusively is in the store before, and need not be read again to be
        # changed
        try:
            async with aclosing(listed(self._volume, directory)) as pages:
                async for entries in pages:
                    below += await self._page(directory, entries)
                    for entry in entries:
                        self._volume.forget(entry.ino)
        except CorruptRecord:
            below = []
            async with aclosing(self._sound(directory)) as pages:
                async for entries in pages:
                    below += await self._page(directory, entries)
        return below

    async def _sound(self, directory: int) -> AsyncGenerator[Sequence[DirectoryEntry], None]:
        """A directory's names as they are in the store, which `listed` has had brought up to date, page by page, but
        for those whose records do not decode."""
        keys, progress = self._context.keys, self._context.progress
        start = prefix = keys.dentries_of(directory)
        while True:
            asked = Range(start, prefix_end(prefix), limit=PAGE_KEYS)
            found = await retry(lambda asked=asked: self._context.store.range(asked), READ_S)  # type: ignore[misc]
            entries = []
            for kv in found.kvs:
                name = keys.parse_dentry(kv.key)[1]
                try:
                    dentry = codec.decode_dentry(kv.value, kv.mod_revision)
                except CorruptRecord as exc:
                    progress.given_up += 1
                    log.error("%r in directory %#x can't be copied: %s", name_text(name), directory, exc)
                else:
                    entries.append(DirectoryEntry(name, dentry.ino, dentry.file_type, dentry.inode))
            yield entries
            if not found.more:
                return
            start = found.kvs[-1].key + b"\0"

    async def _page(self, directory: int, entries: Sequence[DirectoryEntry]) -> list[int]:
        below: list[int] = []
        waiting = iter(entries)

        async def worker() -> None:
            for entry in waiting:
                is_dir = stat.S_ISDIR(entry.file_type)
                if not is_dir and not stat.S_ISREG(entry.file_type):
                    continue
                is_known = entry.inode is not None and entry.inode.policy == self._number
                if not is_known and not await self._tag(entry.ino, directory, entry.name):
                    continue
                if is_dir:
                    below.append(entry.ino)
                else:
                    await self._found(entry.ino, directory, entry.name)

        async with trio.open_nursery() as nursery:
            for _ in range(TAGS_AT_ONCE):
                nursery.start_soon(worker)
        return below

    async def _tag(self, ino: int, directory: int, name: bytes) -> bool:
        """False: another policy's, or gone."""
        try:
            return await self._volume.placement.inherit_policy(ino, (directory, name), self._number)
        except (StaleInode, NoSuchEntry):
            return False
        except CorruptRecord as exc:
            self._context.progress.given_up += 1
            log.error("inode %#x can't be given its policy: %s", ino, exc)
            return False

    async def _found(self, ino: int, directory: int, name: bytes) -> None:
        self._context.progress.walked += 1
        await self._context.backlog.add(Job(ino, (directory, name), MOVED, self._began_ns, walks=[self._walk]))
