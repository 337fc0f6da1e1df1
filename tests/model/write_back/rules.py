"""The rules by name, and what the model takes from the product itself: claims, batches.

A rule that is switched off is left out of the model's steps; the explorer must then find what it is there for.
"""

from __future__ import annotations

from functools import cache

from apollofs.metadata.ahead import Ahead
from apollofs.metadata.exclusives import CHANGES_BEFORE, Exclusion, Exclusives
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.patience import Patience
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.returns import Returns
from apollofs.metadata.store import Put
from tests.model.protocol.rules import KEYS, ino_of, session_of
from tests.model.write_back.state import Held, Write

RULES = {
    "take_compares": "a group is not taken while somebody holds it exclusively",
    "reads_ask": "who reads what he does not hold asks whether somebody holds it exclusively, and has it shared first",
    "takes_ask": "who takes one group asks so of all that he reads with it",
    "held_meanwhile": "what a read did not ask about was held until its reply",
    "guard": "who becomes exclusive proves that nobody else holds the group",
    "queue_first": "the keys of a group go only when nothing of it is queued",
    "flag_first": "a group that is to be shared is not changed ahead of etcd any more",
    "no_claim_while_sharing": "a group is not claimed while the deletion of its key is under way",
    "share_again": "a group that is asked for again while the deletion is under way is shared again",
    "land": "a claim whose group has been wanted before its reply makes nothing exclusive",
    "claim_number": "the reply to a claim is not taken for that to a later one",
    "shared_at_birth": "a directory that is wanted before its maker has heard of its birth is not exclusive",
    "turn_guard": "who takes a turn proves that nobody else holds the group",
    "turn_after_keys": "no turn is taken while the deletion of a key of the group is under way",
    "turn_shared": "a turn on what was wanted for reading before the reply has come is given up",
    "turn_own": "what this mount wrote before the reply has come is newer than what was read with the turn",
    "turn_landing": "a turn that is being taken when a claim lands whose group was wanted before is given up",
    "pending": "what a transaction in flight changes is no fact for what is answered ahead",
    "wait_for_queue": "what is not answered ahead is done after all that was answered before",
    "read_after_queue": "what was answered before a read is in etcd when it is read",
    "queued_is_newest": "what was read never replaces what was answered ahead",
    "in_order": "the queue is committed from its head, in one transaction at a time",
    "one_slot": "a transaction is repeated in its slot until its outcome is known",
    "once": "a transaction that is sent again is not applied again",
    "fence": "a transaction is applied only while its session's slot exists",
    "unlearn": "what a refused transaction has read is not used after a recall",
    "proven": "what is held exclusively is used only while the lease is proven",
    "queue_with_session": "with the session goes what was queued in it",
}


class _Returned(Returns):
    """Remembers only what is to be shared."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.busy = False

    def __contains__(self, group: int) -> bool:
        return False

    def is_sharing(self, group: int) -> bool:
        return self.busy

    def share(self, group: int) -> None:
        self.asked.append(group)


class _Product:
    """The product's own objects around one group, 100."""

    def __init__(self) -> None:
        self.cache = GroupCache(KEYS, lambda: True)
        self.returns = _Returned()
        self.recalls = Recalls(MemoryStore(), KEYS, 1, Patience())
        self.exclusives = Exclusives(KEYS, self.cache, self.returns, self.recalls, acquiring={}, enabled=True)

    def thaw(self, held: Held | None, claims: int) -> None:
        self.cache.clear()
        self.returns.asked.clear()
        self.exclusives._claims = claims
        if held is not None:
            group = self.cache.hold(ino_of(0), 0)
            group.exclusive, group.exclusion_asked, group.changes = held.exclusive, held.claim, CHANGES_BEFORE


@cache
def product() -> _Product:
    return _Product()


def claim(held: Held, claims: int, *, busy: bool) -> int:
    """The number of the claim that the product's transaction makes, 0 if it makes none; `busy`: being shared."""
    real = product()
    real.thaw(held, claims)
    real.returns.busy = busy
    made = real.exclusives.claim(session_of(1), [Put(KEYS.dentry(ino_of(0), b"x"), b"")])
    return made[0].number if made else 0


def landed(held: Held | None, number: int, *, applied: bool) -> tuple[Held | None, bool]:
    """The group after the reply to a claim, and whether its key is to be taken back."""
    real = product()
    real.thaw(held, number)
    key = real.exclusives.key(session_of(1), ino_of(0))
    real.exclusives.land([Exclusion(ino_of(0), number, key)], applied=applied)
    group = real.cache.groups.get(ino_of(0))
    if held is not None and group is not None:
        held = held._replace(exclusive=group.exclusive, claim=group.exclusion_asked)
    return held, bool(real.returns.asked)


@cache
def batch(keys: tuple[int, ...], queue: tuple[Write, ...]) -> int:
    """How many of what is queued, `keys` in order, the product's next transaction commits."""
    ahead = Ahead(KEYS, product().cache, enabled=True, wait_s=1, patience=Patience())
    for key in keys:
        ahead.add([Put(KEYS.dentry(ino_of(0), b"%d" % key), b"")], None, 0, 0, lambda revision: None)
    return len(ahead._next_batch()[0])
