"""One run of retention: all policies of a volume, or one, are applied once, from outside any mount.

One process does it at a time: who holds the key `O` under the lease of its session, in which everything is committed. A
dry run changes nothing and needs no key.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.blobs import open_blob_source
from apollofs.fs.command_volume import command_volume
from apollofs.fs.pace import Pace
from apollofs.fs.retention.candidates import Candidates, fates
from apollofs.fs.retention.carrying import Carrying
from apollofs.fs.retention.looking import Looking
from apollofs.fs.retention.names import Steps
from apollofs.fs.retention.parking import RETIRED, Parking
from apollofs.fs.retention.report import RetentionReport
from apollofs.fs.retention.series import TRACKER_BYTES_MAX, Reach, SeriesReader
from apollofs.fs.site_stores import SiteStores
from apollofs.fs.ungrouped import ungrouped
from apollofs.fs.user_error import UserError
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata.election import Election
from apollofs.metadata.errors import RoleTaken, SessionLost
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.retention import READ_S, Retention, forget_retention, read_retentions
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store, prefix_end
from apollofs.metadata.tree import Tree
from apollofs.metadata.use_questions import UseQuestions
from apollofs.metadata.volume import Volume

log = logging.getLogger(__name__)
SLOTS = 16


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """How retention is applied."""

    dry_run: bool = False
    """Look, ask and report; remove nothing."""
    ops_per_s: float = 0.0
    """Bound of the names that are removed in a second; 0: none."""
    directory: int = 0
    """Only the policy that is set on this one; 0: all."""
    answer_wait_s: float = 30.0
    """A mount that lives and has not answered in this time keeps what it was asked about."""


async def apply_retention(
    store: Store, volume: str, options: ApplyOptions, stores: BlobStoreOptions, version: str
) -> RetentionReport:
    """Apply the retention policies of a volume once. Cancelled, or with an error, the next run goes on.

    Raises RoleTaken where another process is at it, NotFormatted, SessionLost, DeadlineExceeded, StoreError.
    """
    with ungrouped():
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(command_volume(store, volume, version, SLOTS))
            stores_of = SiteStores(opened, stores)
            source = await stack.enter_async_context(open_blob_source(stores_of.open, opened.superblock.block_bytes))
            bodies = ValueBodies(source, opened.superblock.inline_bytes_max, TRACKER_BYTES_MAX)
            return await run_once(store, opened, bodies, options)


async def is_due(store: Store, keys: Keys) -> bool:
    """Whether a run has anything to do: there is a policy, or a run was interrupted. One request."""
    policies = Range(keys.retentions, prefix_end(keys.retentions), limit=1, keys_only=True)
    asked = (policies, Range(keys.dentry(ROOT_INO, RETIRED), keys_only=True))
    result = await retry(lambda: store.txn((), asked), READ_S)
    return any(found is not None and found.kvs for found in result.ranges)


async def run_once(store: Store, volume: Volume, bodies: ValueBodies, options: ApplyOptions) -> RetentionReport:
    """As `apply_retention`, in the session of an open volume; with that it ends (SessionLost): the next session would
    not hold the key."""
    keys = Keys(volume.superblock.name)
    session = volume.session
    with trio.CancelScope() as scope:
        volume.session_lost_hooks.append(scope.cancel)
        try:
            if not options.dry_run:
                other = await Election(store, keys, session, keys.retainer).stand()
                if other is not None:
                    raise RoleTaken(f"retention is being applied already, by process {other.pid} on {other.host}")
            return await _Run(store, volume, bodies, options).run(await read_retentions(store, keys))
        finally:
            volume.session_lost_hooks.remove(scope.cancel)
    raise SessionLost("the session in which retention was applied has ended")


class _Run:
    def __init__(self, store: Store, volume: Volume, bodies: ValueBodies, options: ApplyOptions) -> None:
        self._store = store
        self._keys = Keys(volume.superblock.name)
        self._tree = Tree(store, self._keys)
        self._volume = volume
        self._options = options
        self.report = RetentionReport()
        questions = UseQuestions(store, self._keys, volume.session, options.answer_wait_s)
        self._looking = Looking(volume, questions)
        self._parking = Parking(volume, self._looking, Pace(options.ops_per_s), self.report)
        self._reader = SeriesReader(volume, store, self._keys, bodies)

    async def run(self, policies: Mapping[int, Retention]) -> RetentionReport:
        if not self._options.dry_run:
            await self._parking.settle()
        for directory, policy in policies.items():
            if self._options.directory in (0, directory):
                await self._apply(directory, policy, frozenset(policies))
        return self.report

    async def _apply(self, directory: int, policy: Retention, own: frozenset[int]) -> None:
        moves = await self._reader.revision(self._keys.dirmove)
        path = await self._tree.path_of(directory)
        if path is None:
            if not self._options.dry_run:
                await forget_retention(self._store, self._keys, directory)
            return
        candidates = Candidates(self._volume, self._reader, self._looking, policy)
        try:
            steps = Steps(policy.patterns)
        except UserError as exc:  # the patterns of a newer version
            self.report.fail(f"{name_text(path)}: {exc}")
            return
        await candidates.find(Reach(path.rstrip(b"/"), (directory,), policy.revision, moves), steps, own)
        for error in candidates.errors:
            self.report.fail(error)
        self.report.directories += candidates.directories
        free_bytes = await self._free_bytes(policy)
        decided = await fates(candidates, time.time(), free_bytes, policy)
        carrying = Carrying(self._store, self._keys, self._parking, self._reader, steps, decided)
        gone_bytes = gone = 0
        for candidate, verdict in decided:
            final = verdict if self._options.dry_run else await carrying.carry_out(candidate, verdict)
            self.report.tell(candidate.path, final)
            gone += final.goes
            gone_bytes += final.checkpoint.size_bytes if final.goes else 0
        self._tell_lack(policy, free_bytes, gone_bytes)
        await self._end(gone, gone_bytes)

    async def _end(self, gone: int, gone_bytes: int) -> None:
        """What is out of sight is removed, but for what comes back."""
        if self._options.dry_run:
            self.report.removed_bytes += gone_bytes
        elif gone:
            before = self.report.brought_back
            await self._parking.settle()
            gone -= self.report.brought_back - before
        self.report.removed += gone

    async def _free_bytes(self, policy: Retention) -> int | None:
        """Of the capacity that the policy names, what files of the volume do not hold."""
        if not policy.min_free_bytes:
            return None
        planned = self.report.removed_bytes if self._options.dry_run else 0
        return policy.capacity_bytes - (await self._volume.usage()).bytes + planned

    def _tell_lack(self, policy: Retention, free_bytes: int | None, gone_bytes: int) -> None:
        if free_bytes is not None:
            lacking = policy.min_free_bytes - free_bytes - gone_bytes
            self.report.lacking_bytes = max(self.report.lacking_bytes, lacking)
