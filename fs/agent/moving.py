"""A policy that was set or changed moves what is there already: its tree is walked, once for each change.

What was created before the policy was set gets its number on the way, directories before what is in them is listed, so
that whatever comes later inherits it. Subtrees that have a policy of their own are left out.
"""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from apollofs.fs.agent.backlog import MOVED, Job, Walk
from apollofs.fs.agent.context import AgentContext
from apollofs.metadata import codec
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.session import SessionOptions, retry
from apollofs.metadata.store import KeyValue, Range, prefix_end
from apollofs.metadata.volume import Volume, open_volume

log = logging.getLogger(__name__)
READ_S = 30.0
PAGE_KEYS = 1000
TAGS_AT_ONCE = 16


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
                await _TreeWalk(context, volume, number).run()
                context.state.walked[number] = revision
        for number in context.state.walked.keys() - live.revisions.keys():
            del context.state.walked[number]


@asynccontextmanager
async def _tagging(context: AgentContext) -> AsyncIterator[Volume]:
    """Changes inodes as a mount does: others' delegations are recalled."""
    options = SessionOptions(slots=TAGS_AT_ONCE, delegations=False, write_back=False)
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
        prefix = self._context.keys.dentries_of(directory)
        below: list[int] = []
        start = prefix
        while True:
            asked = Range(start, prefix_end(prefix), limit=PAGE_KEYS)
            found = await retry(lambda asked=asked: self._context.store.range(asked), READ_S)  # type: ignore[misc]
            below += await self._page(directory, found.kvs)
            if not found.more:
                return below
            start = found.kvs[-1].key + b"\0"

    async def _page(self, directory: int, kvs: Sequence[KeyValue]) -> list[int]:
        below: list[int] = []
        waiting = iter(kvs)

        async def worker() -> None:
            for kv in waiting:
                name = self._context.keys.parse_dentry(kv.key)[1]
                dentry = codec.decode_dentry(kv.value, kv.mod_revision)
                known = dentry.inode
                is_dir = stat.S_ISDIR(dentry.file_type)
                if not is_dir and not stat.S_ISREG(dentry.file_type):
                    continue
                is_known = known is not None and known.policy == self._number
                if not is_known and not await self._tag(dentry.ino, directory, name):
                    continue
                if is_dir:
                    below.append(dentry.ino)
                else:
                    await self._found(dentry.ino, directory, name)

        async with trio.open_nursery() as nursery:
            for _ in range(TAGS_AT_ONCE):
                nursery.start_soon(worker)
        return below

    async def _tag(self, ino: int, directory: int, name: bytes) -> bool:
        """False: another policy's, or gone."""
        try:
            return await self._volume.placement.inherit_policy(ino, (directory, name), self._number)
        except StaleInode:
            return False

    async def _found(self, ino: int, directory: int, name: bytes) -> None:
        self._context.progress.walked += 1
        await self._context.backlog.add(Job(ino, (directory, name), MOVED, self._began_ns, walks=[self._walk]))
