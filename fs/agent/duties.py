"""What an elected agent does: each duty runs until it is cancelled. One more is one more line in DUTIES."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from apollofs.fs.agent.archiving import archive_log
from apollofs.fs.agent.context import AgentContext
from apollofs.fs.agent.copier import copy
from apollofs.fs.agent.feed import follow_journal, follow_policies, follow_wanted, make_up
from apollofs.fs.agent.moving import move
from apollofs.fs.agent.state import encode_state
from apollofs.fs.collecting import collect
from apollofs.fs.collection import CollectOptions
from apollofs.fs.retention import ApplyOptions, apply_retention
from apollofs.fs.retention.applying import is_due
from apollofs.metadata.errors import CollectorBusy, RoleTaken
from apollofs.metadata.returns import NOTED
from apollofs.metadata.store import Put

log = logging.getLogger(__name__)
SAVE_EVERY_S = 2.0


async def keep_state(context: AgentContext) -> None:
    """Write down how far this site has come, whenever that has moved."""
    before: dict[str, float] = {}
    while True:
        state, backlog = context.state, context.backlog
        position, walked = backlog.position, dict(state.walked)
        facts = {**context.progress.counters(backlog), "walking": context.progress.walking}
        facts |= {"walked": context.progress.walked, "last_lag_s": round(context.progress.lag_s, 3)}
        seen = {**facts, "position": position, "walks": hash(tuple(sorted(walked.items())))}
        if seen != before and position:
            before, state.position = seen, position
            state.facts, state.updated_ns = facts, time.time_ns()
            put = Put(context.keys.agent_state(context.site.id), encode_state(state))
            await context.session.commit((), (put,), NOTED, time_ns=state.updated_ns)
        await trio.sleep(SAVE_EVERY_S)


async def collect_garbage(context: AgentContext) -> None:
    """Run the collector now and then. One runs in a volume at a time, whichever site's agent began it."""
    options = context.options
    if not options.gc_every_s:
        return
    uploads_at = trio.current_time() + options.gc_every_s
    while True:
        await trio.sleep(options.gc_every_s)
        uploads = trio.current_time() >= uploads_at
        asked = CollectOptions(grace_s=options.gc_grace_s, uploads=uploads)
        if not uploads:
            asked = replace(asked, pack_used_min=0.0)  # that reads every name too
        try:
            report = await collect(context.store, context.keys.volume, asked, context.stores, context.record.version)
        except CollectorBusy as exc:
            log.info("%s", exc)
            continue
        if uploads:
            uploads_at = trio.current_time() + options.uploads_every_s
        context.progress.collections += 1
        removed = report.dropped.blobs + report.uploads.blobs
        log.info("collected: %d tombstones, %d blobs; %d errors", report.tombstones, removed, len(report.errors))


async def retire_checkpoints(context: AgentContext) -> None:
    """Apply the retention policies now and then. One process does that in a volume at a time, whichever site's."""
    every_s = context.options.retention_every_s
    if not every_s:
        return
    asked = ApplyOptions(ops_per_s=context.options.retention_ops_per_s)
    while True:
        await trio.sleep(every_s)
        if not await is_due(context.store, context.keys):
            continue
        try:
            report = await apply_retention(
                context.store, context.keys.volume, asked, context.stores, context.record.version
            )
        except RoleTaken as exc:
            log.info("%s", exc)
            continue
        context.progress.retired += report.removed
        context.progress.retention_kept = report.kept
        log.info("retention: %d checkpoints removed, %d kept", report.removed, report.kept)
        for error in report.errors:
            log.warning("retention: %s", error)


Duty = Callable[[AgentContext], Awaitable[None]]

DUTIES: tuple[Duty, ...] = (
    follow_policies,
    follow_journal,
    follow_wanted,
    make_up,
    move,
    copy,
    collect_garbage,
    archive_log,
    retire_checkpoints,
    keep_state,
)
