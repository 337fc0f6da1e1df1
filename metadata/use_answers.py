"""What a mount answers the collector: which of the inodes whose bytes are to be removed it still uses, and how old.

The collector (`use_questions.py`) puts a question, a list of inodes, and a notice into each mount's inbox. A mount
reads the question and answers with each of these inodes that it has open, with the oldest version of its body that it
may still read. Opening a file costs nothing for it.

Why that is enough, even if a tombstone is collected at once:
- What a mount opens after it has read the question is asked of the store, or cached under a delegation that was
  recalled before the body was changed: either way it is newer than the tombstone.
- What it was just about to open counts as used (`Bodies.in_use`).
- A blob that several files share from birth may lose its first referent before the commit of its last one. So each
  mount names, whatever it is asked, the blobs to which commits under way are going to refer (`blobs_in_use`).
- A session that begins later has read nothing yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.inbox import Inbox
from apollofs.metadata.keys import Keys
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import Compare, Delete, Put, Range, Relation, Store, Target

log = logging.getLogger(__name__)
QUESTIONS_MAX = 64
"""Questions that wait here; there is one collector, and it asks one at a time."""
READ_S = 10.0

InUse = Callable[[Sequence[int]], Mapping[int, int]]
"""Of these inodes, those in use: each with the oldest body_version that may still be read."""


def _nothing(inos: Sequence[int]) -> Mapping[int, int]:
    return {}


class UseAnswers:
    """Answers for one mount, over all its sessions. See `inbox.Listener`."""

    def __init__(self, store: Store, keys: Keys, inbox: Inbox) -> None:
        self._store = store
        self._keys = keys
        self.in_use: InUse = _nothing
        """What is open here; set by who opens files."""
        self.blobs_in_use: Callable[[], Collection[int]] = tuple
        """Blobs that were stored for several files, not all of which are committed yet; set by who stores such."""
        self._heard, self._questions = trio.open_memory_channel[tuple[int, int]](QUESTIONS_MAX)
        inbox.add(self)

    def recalled(self, wanted: tuple[int, ...], what: bytes) -> None:
        """See `inbox.Listener`; a question's notice has three numbers."""
        if len(wanted) == 3:
            try:
                self._heard.send_nowait(wanted[:2])
            except trio.WouldBlock:
                log.info("a question of the collector is not answered: too many wait")

    def deaf(self) -> None:
        """See `inbox.Listener`: what can't be heard is not answered, so nothing is collected that may be in use."""

    async def serve(self, session: Session) -> None:
        """Answer until cancelled. Runs beside the session's keepalive."""
        async for collector, batch in self._questions:
            try:
                await self._answer(session, collector, batch)
            except MetadataError as exc:
                log.info("a question of the collector is not answered: %s", exc)

    async def _answer(self, session: Session, collector: int, batch: int) -> None:
        key = self._keys.question(collector, batch)
        found = await retry(lambda: self._store.range(Range(key)), READ_S)
        notice = Delete(self._keys.collection_notice(session.number, collector, batch))
        if not found.kvs:
            return
        used = self.in_use(codec.decode_fields(found.kvs[0].value))
        flat = [number for pair in used.items() for number in pair]
        value = codec.encode_fields([flat, sorted(self.blobs_in_use())])
        answer = Put(self._keys.answer(collector, batch, session.number), value, session.lease_id)
        # who has asked may have given up: then nobody would take the answer away
        asked = Compare(key, Target.CREATE, Relation.GREATER, 0)
        await session.commit((asked,), (answer, notice), NOTED, time_ns=time.time_ns())
