"""How a session begins: a number that is never used again, a lease, and the journal slots that fence it."""

from __future__ import annotations

import time
from dataclasses import replace

import trio

from apollofs.metadata import codec, journal
from apollofs.metadata.errors import NotFormatted, OutcomeUnknown, StoreUnavailable, UnsupportedFormat
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import MountRecord
from apollofs.metadata.retired_sites import refusal
from apollofs.metadata.session import BACKOFF_FIRST_S, Session, SessionOptions, Slot, boot_time, retry
from apollofs.metadata.store import Compare, Put, Range, Relation, Store, Target

SESSION_MAX = (1 << 24) - 1
"""Session numbers are 24 bits of a blob's number."""


async def open_session(store: Store, keys: Keys, options: SessionOptions, record: MountRecord, site_id: int) -> Session:
    """Take a number and a lease, and make the slots: three requests. `record.session` is filled in here.

    `site_id` 0: of no site. Raises NotFormatted, UnknownSite, SiteLeaving besides what a session raises.
    """
    number = await _next_number(store, keys, options)
    session = Session(store, keys, options, replace(record, session=number, started_ns=time.time_ns()), site_id)
    asked = boot_time()
    lease = await retry(lambda: store.lease_grant(options.lease_ttl_s), options.operation_deadline_s)
    session.lease_id = lease.id
    opened = journal.encode(SlotRecord(0, site_id, session.record.started_ns, (Change(Kind.OPEN),)))
    slots = [keys.slot(number, index) for index in range(options.slots)]
    puts = [Put(keys.mount(number), codec.encode_mount(session.record), lease.id)]
    puts += [Put(key, opened, lease.id) for key in slots]
    compares = (
        Compare(keys.superblock, Target.VERSION, Relation.GREATER, 0),
        Compare(slots[0], Target.VERSION, Relation.EQUAL, 0),
        Compare(keys.retired_site(site_id), Target.VERSION, Relation.EQUAL, 0),
    )
    reads = (Range(slots[0]), Range(keys.retired_site(site_id)))
    result = await retry(lambda: store.txn(compares, puts, reads), options.operation_deadline_s)
    revision = result.revision
    if not result.succeeded:
        made, retired = result.ranges
        assert made is not None and retired is not None
        if retired.kvs and not made.kvs:
            raise refusal(retired.kvs[0].value, repr(record.site))
        if not made.kvs:
            raise NotFormatted(f"volume {keys.volume} has been destroyed")
        revision = made.kvs[0].mod_revision  # an earlier copy of this transaction, whose reply was lost, made them
    session.begin([Slot(key, revision) for key in slots], asked)
    return session


async def _next_number(store: Store, keys: Keys, options: SessionOptions) -> int:
    """Count the volume's sessions up. If a reply is lost a number is skipped, never used twice."""
    while True:
        found = await retry(lambda: store.range(Range(keys.session_counter)), options.operation_deadline_s)
        held = found.kvs[0] if found.kvs else None
        number = (codec.decode_counter(held.value) if held else 0) + 1
        if number > SESSION_MAX:
            raise UnsupportedFormat(f"volume {keys.volume} has used all its {SESSION_MAX} session numbers")
        compare = Compare(keys.session_counter, Target.MOD, Relation.EQUAL, held.mod_revision if held else 0)
        try:
            put = Put(keys.session_counter, codec.encode_counter(number))
            if (await store.txn((compare,), (put,))).succeeded:
                return number
        except (OutcomeUnknown, StoreUnavailable):
            await trio.sleep(BACKOFF_FIRST_S)
