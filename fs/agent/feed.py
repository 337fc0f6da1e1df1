"""Where an agent's jobs come from: the journal says what was committed, and `W/<site>/` what somebody waits for.

The history of the journal slots is the log of all commits (`metadata/journal.py`). If etcd no longer has the part that
is owed, all trees that have a policy are walked anew: that is the fallback, and how a site's first agent begins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import trio

from apollofs.fs.agent.backlog import COMMITTED, MOVED, WANTED, Job, Owed
from apollofs.fs.agent.context import AgentContext
from apollofs.metadata import codec, journal
from apollofs.metadata.errors import Compacted, CorruptRecord
from apollofs.metadata.journal import Kind
from apollofs.metadata.policy import decode_policy, read_policies
from apollofs.metadata.session import retry
from apollofs.metadata.store import NOW, Event, KeyValue, Range, WatchBatch, prefix_end

log = logging.getLogger(__name__)
READ_S = 30.0
QUIET_REVISIONS = 10_000
PAGE_KEYS = 1000


async def follow_journal(context: AgentContext) -> None:
    """Add a job for each commit, in order, until cancelled. Raises StoreError."""
    slots, state = context.keys.slots, context.state
    await context.policies.known.wait()
    while True:
        if not state.position:
            await _begin_anew(context)
        context.backlog.mark(state.position)
        try:
            watching = context.store.watch(slots, prefix_end(slots), start_revision=state.position + 1)
            async with watching as batches:
                async for batch in batches:
                    await _take(context, batch)
        except Compacted:
            log.info("the journal after revision %d is gone: all trees with policies are walked", state.position)
            state.position = 0


async def _begin_anew(context: AgentContext) -> None:
    """Nothing is known to have been done: every tree is walked, and the journal followed from now on. A walk that is
    under way has begun before that, and is noted in the old mapping: it does not count."""
    slots = context.keys.slots
    found = await retry(lambda: context.store.range(Range(slots, prefix_end(slots), limit=1, keys_only=True)), READ_S)
    context.state.walked = {}
    context.state.position = found.revision
    context.policies.changed_now()


async def _take(context: AgentContext, batch: WatchBatch) -> None:
    """What is no commit moves the position by large steps only: agents would answer each other's states for ever."""
    backlog, found = context.backlog, False
    for event in batch.events:
        await trio.lowlevel.checkpoint()  # who is far behind gets thousands at once: the lease is renewed in between
        if found:
            backlog.mark(event.kv.mod_revision - 1)
        for job in _jobs(context, event, COMMITTED):
            found = True
            if context.policies.by_number:
                await backlog.add(job)
    backlog.heard = batch.revision
    if found or batch.revision > backlog.position + QUIET_REVISIONS:
        backlog.mark(batch.revision)


async def make_up(context: AgentContext) -> None:
    """Add again what was left out while sites could not be read, behind what is committed now, until cancelled. Raises
    StoreError."""
    backlog = context.backlog
    while True:
        owed = await backlog.owed()
        try:
            await _read_again(context, owed)
        except Compacted:
            log.info("the journal from revision %d on is gone: all trees with policies are walked", owed.first)
            context.state.walked = {}  # a walk that is under way may have passed by what was left out
            context.policies.changed_now()
        backlog.made_up(0)


async def _read_again(context: AgentContext, owed: Owed) -> None:
    slots = context.keys.slots
    async with context.store.watch(slots, prefix_end(slots), start_revision=owed.first) as batches:
        async for batch in batches:
            for event in batch.events:
                await trio.lowlevel.checkpoint()
                context.backlog.made_up(event.kv.mod_revision)
                for job in _jobs(context, event, MOVED):
                    await context.backlog.add(job)
            if batch.revision >= owed.last:
                break


def _jobs(context: AgentContext, event: Event, rank: int) -> list[Job]:
    if event.deleted or context.keys.parse_numbers(event.kv.key)[0] == context.session.number:
        return []
    try:
        record = journal.decode(event.kv.value)
    except CorruptRecord as exc:
        log.error("a record of the journal is passed over: %s", exc)
        return []
    return [
        Job(
            change.ino,
            (change.parent, change.name) if change.parent else None,
            rank,
            record.time_ns,
            event.kv.mod_revision,
        )
        for change in record.changes
        if change.kind is Kind.COMMIT
    ]


async def follow_wanted(context: AgentContext) -> None:
    """Add what is waited for, ahead of everything else, until cancelled. Raises StoreError."""
    prefix = context.keys.wanted_at(context.site.id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_look_again, context)
        async with context.store.watch(prefix, prefix_end(prefix), start_revision=NOW) as batches:
            async for batch in batches:
                if not batch.events:
                    await _add_all_wanted(context)
                await _add_wanted(context, [event.kv for event in batch.events if not event.deleted])


async def _look_again(context: AgentContext) -> None:
    while True:
        await context.backlog.wishes_left_out()
        await _add_all_wanted(context)


async def _add_all_wanted(context: AgentContext) -> None:
    """However many there are, as soon as there is room for them."""
    start = prefix = context.keys.wanted_at(context.site.id)
    while True:
        asked = Range(start, prefix_end(prefix), limit=PAGE_KEYS)
        found = await retry(lambda asked=asked: context.store.range(asked), READ_S)  # type: ignore[misc]
        await _add_wanted(context, found.kvs)
        if not found.more:
            return
        start = found.kvs[-1].key + b"\0"


async def _add_wanted(context: AgentContext, wishes: Sequence[KeyValue]) -> None:
    for kv in wishes:
        ino = context.keys.parse_numbers(kv.key)[1]
        try:
            parent, name = codec.decode_fields(kv.value)
        except (CorruptRecord, ValueError) as exc:
            log.error("a wish for inode %#x is passed over: %s", ino, exc)
            continue
        await context.backlog.add(
            Job(ino, (parent, name) if parent else None, WANTED, time.time_ns(), wish=kv.mod_revision)
        )


async def follow_policies(context: AgentContext) -> None:
    """Keep `context.policies` as they are, until cancelled. Raises StoreError."""
    prefix = context.keys.policies
    async with context.store.watch(prefix, prefix_end(prefix), start_revision=NOW) as batches:
        async for _ in batches:
            found, _revision = await read_policies(context.store, context.keys)
            live = context.policies
            live.by_number = {number: decode_policy(kv.value) for number, kv in found.items()}
            live.revisions = {number: kv.mod_revision for number, kv in found.items()}
            live.known.set()
            live.changed_now()
