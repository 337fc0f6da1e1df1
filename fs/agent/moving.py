"""A policy that was set or changed moves what is there already: its tree is walked, once for each change.

What was created before the policy was set gets its number on the way, directories before what is in them is listed, so
that whatever comes later inherits it. Subtrees that have a policy of their own are left out, those too that were given
one after the walk had begun: each transaction compares that the directory above still has the number.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import trio

from apollofs.fs.agent.backlog import MOVED, Job, Walk
from apollofs.fs.agent.context import AgentContext
from apollofs.metadata.errors import NoSuchEntry, StaleInode
from apollofs.metadata.listing import listed
from apollofs.metadata.records import DirectoryEntry
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.volume import Volume, open_volume

log = logging.getLogger(__name__)
TAGS_AT_ONCE = 64
"""They share transactions."""


async def move(context: AgentContext) -> None:
    """The duty: walk the trees of policies that have changed since they were last walked, until cancelled."""
    while True:
        changed, live = context.policies.changed, context.policies
        due = [number for number, revision in live.revisions.items() if context.state.walked.get(number) != revision]
        if not due:
            await changed.wait()
            continue
        async with _tagging(context) as volume:
            for number in due:
                revision = live.revisions.get(number, 0)
                walked = context.state.walked  # another one if the journal is lost meanwhile
                await _TreeWalk(context, volume, number).run()
                walked[number] = revision
        for number in context.state.walked.keys() - live.revisions.keys():
            del context.state.walked[number]


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

    async def run(self) -> None:
        """Returns when everything that was found has its copies. Raises SessionLost, DeadlineExceeded, StoreError."""
        progress = self._context.progress
        progress.walking, progress.walked = self._number, 0
        try:
            left = [self._number]
            while left:
                left += await self._list(left.pop())
            await self._walk.wait()
        finally:
            progress.walking = 0
        log.info("the tree of policy %#x is as it should be here: %d files", self._number, progress.walked)

    async def _list(self, directory: int) -> list[int]:
        """The files of a directory become jobs; its subdirectories are returned."""
        below: list[int] = []
        # read as a mount reads: what others hold exclusively is in the store before, and need not be read again to be
        # changed
        async with aclosing(listed(self._volume, directory)) as pages:
            async for entries in pages:
                below += await self._page(directory, entries)
                for entry in entries:
                    self._volume.forget(entry.ino)
        return below

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

    async def _found(self, ino: int, directory: int, name: bytes) -> None:
        self._context.progress.walked += 1
        await self._context.backlog.add(Job(ino, (directory, name), MOVED, self._began_ns, walks=[self._walk]))
