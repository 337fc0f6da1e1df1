"""Which of the held groups this mount holds exclusively, so that it may change them without asking (`ahead.py`).

A group becomes exclusive with a transaction that changes it, at the second one, and with the one that makes it. It is
shared again when another mount wants to read it, and then left so for a while, as long as that one goes on reading;
with it all that have not been changed just now, since who reads one directory of a tree will read the others. What is
idle is shared unasked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio

from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.groups import Acquisition, groups_written
from apollofs.metadata.keys import Keys
from apollofs.metadata.pauses import Pauses
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.returns import Returns
from apollofs.metadata.session import Session
from apollofs.metadata.store import Compare, Delete, Put, Range, RangeResult, Relation, Target, prefix_end

CHANGES_BEFORE = 2
BUSY_S = 0.05
"""A group that was changed so recently stays exclusive when another one is shared."""
IDLE_S = 5.0
LOOK_EVERY_S = 2.5


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What one transaction puts to hold a group exclusively; `number` tells it from others of the group."""

    group: int
    number: int
    put: Put


class Exclusives:
    """One mount's."""

    def __init__(
        self,
        keys: Keys,
        cache: GroupCache,
        returns: Returns,
        recalls: Recalls,
        *,
        acquiring: Mapping[int, Acquisition],
        enabled: bool,
    ) -> None:
        """`acquiring`: what the mount is taking."""
        self._keys = keys
        self._acquiring = acquiring
        self._cache = cache
        self._returns = returns
        self._recalls = recalls
        self.ask_to_share = recalls.share
        self.enabled = enabled
        self._pauses = Pauses()
        self._claims = 0
        self.shared = 0
        """How often others asked to share."""

    def claim(self, session: Session, writes: Sequence[Put | Delete]) -> list[Exclusion]:
        """What a transaction that proves that nobody else holds what it writes puts to keep it so, but for directories
        that it removes. Its outcome is for `land`. Nothing while an earlier deletion of such a key may still arrive."""
        claims = []
        removed = {write.key for write in writes if isinstance(write, Delete)}
        for group in groups_written(self._keys, writes) if self.enabled else ():
            if self._keys.inode(group) in removed:
                continue
            held = self._cache.usable(group)
            if held is None or held.exclusive or held.exclusion_asked:
                continue
            held.changes += 1
            if held.changes >= CHANGES_BEFORE and self._is_free(group) and not session.in_doubt:
                self._claims += 1
                held.exclusion_asked = self._claims
                claims.append(Exclusion(group, self._claims, self.key(session, group)))
        return claims

    def _is_free(self, group: int) -> bool:
        return self._pauses.is_over(group) and not self._returns.is_sharing(group) and group not in self._returns

    def key(self, session: Session, group: int) -> Put:
        return Put(self._keys.exclusive(group, session.number), b"", session.lease_id)

    def born(self, session: Session, group: int) -> list[Put]:
        """As `claim`, for the transaction that makes a directory."""
        return [self.key(session, group)] if self.enabled else []

    def land(self, claims: Sequence[Exclusion], *, applied: bool | None) -> None:
        """The transaction has come back. Where it is not known whether it was applied (None), or where the group has
        been wanted meanwhile, the keys are taken back: then what was claimed since goes too."""
        for claim in claims:
            held = self._cache.groups.get(claim.group)
            if applied is not None and held is not None and held.exclusion_asked == claim.number:
                held.exclusion_asked = 0
                held.exclusive = applied
            elif applied is not False:
                self._share(claim.group)

    # -- what others hold --------------------------------------------------------------------------------------------

    def holder_of(self, group: int) -> Range:
        """A question for who holds the group exclusively, if anybody does."""
        prefix = self._keys.exclusives_on(group)
        return Range(prefix, prefix_end(prefix), limit=1, keys_only=True)

    def free(self, group: int) -> list[Compare]:
        """That a group may be taken: nobody waits to change it, and nobody holds it exclusively."""
        prefixes = (self._keys.writers_on(group), self._keys.exclusives_on(group))
        return [Compare(prefix, Target.CREATE, Relation.EQUAL, 0, prefix_end(prefix)) for prefix in prefixes]

    def groups_of(self, asked: Iterable[Range]) -> list[int]:
        """The groups that a read of the store's newest state asks for."""
        groups = (self._keys.group_of(range_.key) for range_ in asked if not range_.revision)
        return [group for group in dict.fromkeys(groups) if group is not None]

    def unheld(self, asked: Iterable[Range]) -> list[int]:
        """Those of them that others may hold exclusively for all we know."""
        return [group for group in self.groups_of(asked) if self._cache.usable(group) is None]

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

    def still_read(self, groups: Iterable[int]) -> None:
        """Others had to give groups back so that this mount can change them: those that had to be shared just now are
        still read elsewhere, and stay shared for longer."""
        for group in groups:
            if not self._pauses.is_over(group):
                self._pauses.begin(group)

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
            held.exclusive = False
            held.exclusion_asked = held.changes = 0
        if group in self._acquiring:
            self._acquiring[group].shared = True  # the deletion may come after the key that is under way
        self._returns.share(group)
