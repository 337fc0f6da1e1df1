"""Which of the held groups this mount holds exclusively, so that it may change them without asking (`ahead.py`).

A group becomes exclusive with a transaction that changes it, at the second one, and with the one that makes it. It is
shared again when another mount wants to read it, and then left so for a while; with it all that have not been changed
just now, since who reads one directory of a tree will read the others. What is idle is shared unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import trio

from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.groups import groups_written
from apollofs.metadata.keys import Keys
from apollofs.metadata.pauses import Pauses
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.returns import Returns
from apollofs.metadata.session import Session
from apollofs.metadata.store import Delete, Put, Range, RangeResult, prefix_end

CHANGES_BEFORE = 2
BUSY_S = 0.05
"""A group that was changed so recently stays exclusive when another one is shared."""
IDLE_S = 5.0
LOOK_EVERY_S = 2.5


class Exclusives:
    """One mount's."""

    def __init__(self, keys: Keys, cache: GroupCache, returns: Returns, recalls: Recalls, *, enabled: bool) -> None:
        self._keys = keys
        self._cache = cache
        self._returns = returns
        self._recalls = recalls
        self.ask_to_share = recalls.share
        self.enabled = enabled
        self._pauses = Pauses()
        self.shared = 0
        """How often others asked to share."""

    def claim(self, session: Session, writes: Sequence[Put | Delete]) -> list[Put]:
        """What a transaction that proves that nobody else holds what it writes puts to keep it so, but for directories
        that it removes. Its outcome is for `land`."""
        claims = []
        removed = {write.key for write in writes if isinstance(write, Delete)}
        for group in groups_written(self._keys, writes) if self.enabled else ():
            if self._keys.inode(group) in removed:
                continue
            held = self._cache.usable(group)
            if held is None or held.exclusive or held.exclusion_asked:
                continue
            held.changes += 1
            if held.changes >= CHANGES_BEFORE and self._is_free(group):
                held.exclusion_asked = True
                claims.append(self.key(session, group))
        return claims

    def _is_free(self, group: int) -> bool:
        return self._pauses.is_over(group) and not self._returns.is_sharing(group) and group not in self._returns

    def key(self, session: Session, group: int) -> Put:
        return Put(self._keys.exclusive(group, session.number), b"", session.lease_id)

    def born(self, session: Session, group: int) -> list[Put]:
        """As `claim`, for the transaction that makes a directory."""
        return [self.key(session, group)] if self.enabled else []

    def land(self, claims: Sequence[Put], *, applied: bool | None) -> None:
        """The transaction has come back. Where it is not known whether it was applied (None), or where the group has
        been wanted meanwhile, the keys are taken back."""
        for claim in claims:
            group = self._keys.parse_numbers(claim.key)[0]
            held = self._cache.groups.get(group)
            wanted = held is None or not held.exclusion_asked
            if held is not None:
                held.exclusion_asked = False
                held.exclusive = held.exclusive or (applied is True and not wanted)
            if applied is None or (applied and wanted):
                self._returns.share(group)

    # -- what others hold --------------------------------------------------------------------------------------------

    def holder_of(self, group: int) -> Range:
        """A question for who holds the group exclusively, if anybody does."""
        prefix = self._keys.exclusives_on(group)
        return Range(prefix, prefix_end(prefix), limit=1, keys_only=True)

    def unheld(self, asked: Iterable[Range]) -> list[int]:
        """The groups that a read of the store asks for, and that others may hold exclusively for all we know."""
        groups = (self._keys.group_of(range_.key) for range_ in asked if not range_.revision)
        return [group for group in dict.fromkeys(groups) if group is not None and self._cache.usable(group) is None]

    def others(self, answers: Iterable[RangeResult]) -> list[tuple[int, int]]:
        """(group, session) of the other mounts that the answers to `holder_of` name."""
        session = self._recalls.session
        holders = [self._keys.parse_numbers(kv.key) for answer in answers for kv in answer.kvs]
        return [(group, holder) for group, holder in holders if session is None or holder != session.number]

    # -- sharing -----------------------------------------------------------------------------------------------------

    def share(self, group: int) -> None:
        """Another mount wants to read the group: what is queued of it is committed, then it may."""
        self.shared += 1
        self._pauses.begin(group)
        self._share(group)
        self._share_idle(BUSY_S)

    async def share_idle(self) -> None:
        """Let others read what this mount has not changed for a while. Runs until cancelled."""
        while True:
            await trio.sleep(LOOK_EVERY_S)
            self._share_idle(IDLE_S)

    def _share_idle(self, idle_s: float) -> None:
        before = trio.current_time() - idle_s
        for group, held in self._cache.groups.items():
            if held.exclusive and held.changed_at < before:
                self._share(group)

    def _share(self, group: int) -> None:
        held = self._cache.groups.get(group)
        if held is not None:
            held.exclusive = held.exclusion_asked = False
            held.changes = 0
        self._returns.share(group)
