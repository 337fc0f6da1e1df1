"""The groups that a mount holds, and what is known of them: answers without a request. No I/O, and no policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import trio

from apollofs.metadata.groups import QUEUED, Group, groups_written
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Delete, KeyValue, Put, Range, RangeResult

GROUPS_MAX = 8192
KEYS_MAX = 400_000
"""Cached keys over all groups."""
PAGED_KEYS_MAX = KEYS_MAX // 2
"""A group that has more is learnt no further by listing it page by page."""
Answer = tuple[KeyValue | None]


class GroupCache:
    """Answers only while `proven()`, of what is held under a seal while `trusts` that, and nothing that a write of this
    mount's in flight may have changed."""

    def __init__(self, keys: Keys, proven: Callable[[], bool], trusts: Callable[[int], bool] = lambda _: False) -> None:
        self._keys = keys
        self._times = keys.table(b"t")
        self._children = keys.table(b"c")
        self._proven = proven
        self._trusts = trusts
        self._pending: Counter[bytes] = Counter()
        self.groups: dict[int, Group] = {}
        """What is held, in the order of taking."""
        self.keys = 0
        """How many are cached over all groups."""

    # -- what is held ------------------------------------------------------------------------------------------------

    def hold(self, group: int, revision: int) -> Group:
        """It was taken as of `revision`; nothing is known of it yet."""
        self.drop(group)
        held = self.groups[group] = Group(group, revision)
        return held

    def drop(self, group: int) -> None:
        """It is not held any more, if it was."""
        held = self.groups.pop(group, None)
        if held is not None:
            self.keys -= len(held.known)

    def clear(self) -> None:
        """Nothing is held but what seals cover. What is in flight stays so."""
        self.groups = {group: held for group, held in self.groups.items() if held.seal}
        self.keys = sum(len(held.known) for held in self.groups.values())

    @property
    def is_full(self) -> bool:
        """Whether more is held than may be: then the `least_used` should go."""
        return len(self.groups) > GROUPS_MAX or (self.keys > KEYS_MAX and bool(self.groups))

    def least_used(self) -> int:
        """The group to give back first: the oldest one that was not asked for since this was asked last."""
        while True:
            group, held = next(iter(self.groups.items()))
            if held.answers == held.answers_before:
                return group
            held.answers_before = held.answers
            self.groups[group] = self.groups.pop(group)

    # -- answers -----------------------------------------------------------------------------------------------------

    def usable(self, group: int) -> Group | None:
        """A held group, while what is cached of it may be answered; but ask for its keys here."""
        held = self.groups.get(group)
        if held is None or not (self._trusts(held.seal) if held.seal else self._proven()):
            return None
        held.answers += 1
        return held

    def is_exclusive(self, group: int) -> bool:
        """Whether this mount may change the group without asking."""
        held = self.usable(group)
        return held is not None and held.exclusive

    def is_pending(self, key: bytes) -> bool:
        """Whether a write in flight changes a key."""
        return key in self._pending

    def has_dentries(self, group: int) -> bool | None:
        """Whether a completely known directory has any entry."""
        held = self.usable(group)
        if held is None or not held.complete:
            return None
        prefix = self._keys.dentries_of(group)
        if any(key.startswith(prefix) for key in self._pending):
            return None
        return any(kv is not None and key.startswith(prefix) for key, (kv, _) in held.known.items())

    def peek(self, group: int, key: bytes) -> Answer | None:
        """What is cached of a single key: (its value or None if it is absent,), or None if that is not known."""
        held = self.usable(group)
        if held is None or key in self._pending:
            return None
        found = held.known.get(key)
        if found is not None:
            return (found[0],)
        return (None,) if held.complete and key.startswith(self._keys.dentries_of(group)) else None

    def children(self, group: int) -> int | None:
        """How many subdirectories a held directory has, if known."""
        held = self.usable(group)
        if held is None:
            return None
        return None if self._keys.children_of(group) in self._pending else held.children

    def listing(self, group: int, keys_max: int) -> list[KeyValue] | None:
        """All dentries of a completely known directory, in name order; None if more keys of it are cached."""
        held = self.usable(group)
        if held is None or not held.complete or len(held.known) > keys_max:
            return None
        prefix = self._keys.dentries_of(group)
        if any(key.startswith(prefix) for key in self._pending):
            return None
        return sorted(
            (kv for key, (kv, _) in held.known.items() if kv is not None and key.startswith(prefix)),
            key=lambda kv: kv.key,
        )

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, group: int, asked: Iterable[Range], answers: Iterable[RangeResult], revision: int) -> None:
        """Keep the answers to a read as of `revision`, if the group has been held since then."""
        held = self.groups.get(group)
        if held is None or revision < held.taken_revision:
            return
        before = len(held.known)
        for question, answer in zip(asked, answers, strict=True):
            if question.count_only:
                if question.key == self._keys.children_of(group):
                    held.count(answer.count, revision)
            elif not question.range_end and self._keys.group_of(question.key) == group:
                held.learn(question.key, answer.kvs[0] if answer.kvs else None, revision)
        self.keys += len(held.known) - before

    def learn_page(self, group: int, start: bytes, page: RangeResult, revision: int) -> None:
        """Keep dentries that were read as of `revision`, if the group has been held since then: those from the key
        `start` on, up to the limit of the read. Pages that follow each other, as of one revision, make the group
        complete with the last one. A group that has very many is not kept further: it would drive out all others.
        """
        held = self.groups.get(group)
        if held is None or revision < held.taken_revision or len(held.known) > PAGED_KEYS_MAX:
            return
        before = len(held.known)
        for kv in page.kvs:
            held.learn(kv.key, kv, revision)
        if start == self._keys.dentries_of(group) or held.paged == (start, revision):
            held.paged = (page.kvs[-1].key + b"\0", revision) if page.more else None
            held.complete = held.complete or not page.more
        self.keys += len(held.known) - before

    def apply(self, group: int, write: Put | Delete, revision: int, *, queued: bool = False) -> None:
        """A write of this mount's was applied at `revision`, or is `queued` and will be, at that or a later one."""
        held = self.groups.get(group)
        if held is None or revision < held.taken_revision:
            return
        held.changed = True
        as_of = QUEUED if queued else revision
        if write.key.startswith(self._children):
            held.change_children(1 if isinstance(write, Put) else -1, as_of)
            return
        before = len(held.known)
        known = held.known.get(write.key)
        if known is not None and known[1] == QUEUED and not queued:
            del held.known[write.key]  # a directory's times, written blindly: which of the two comes last is not known
        else:
            kv = KeyValue(write.key, write.value, 0, revision, 0) if isinstance(write, Put) else None
            held.learn(write.key, kv, as_of)
        self.keys += len(held.known) - before

    def committed(self, key: bytes, revision: int) -> None:
        """A queued write is in the store as of `revision`, and no other one of its key is queued."""
        group = self._keys.group_of(key)
        held = self.groups.get(group) if group is not None else None
        known = held.known.get(key) if held is not None else None
        if held is not None and known is not None and known[1] == QUEUED:
            held.known[key] = (known[0], revision)

    def caught_up(self, group: int, revision: int) -> None:
        """Nothing of a group is queued any more; the last of it was committed at `revision`."""
        held = self.groups.get(group)
        if held is not None and held.children_changed == QUEUED:
            held.children_changed = revision

    def note_change(self, writes: Iterable[Put | Delete]) -> None:
        """This mount changes groups ahead of the store."""
        for group in groups_written(self._keys, writes):
            held = self.groups.get(group)
            if held is not None:
                held.changed_at = trio.current_time()

    # -- writes in flight --------------------------------------------------------------------------------------------

    def start_write(self, writes: Sequence[Put | Delete]) -> list[bytes]:
        """From now on what they change is not answered; what it returns is for `end_write`."""
        pending = self._written_keys(writes)
        for key in pending:
            self._pending[key] += 1
        return pending

    def end_write(self, pending: Sequence[bytes]) -> None:
        """They have come back."""
        for key in pending:
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]

    def _written_keys(self, writes: Sequence[Put | Delete]) -> list[bytes]:
        """What is not answered while these writes are in flight.

        Not among it: a directory's times. They change with every name, and the kernel asks for them before each call;
        until a call here has returned, this host may still see the times from before it (docs/POSIX.md, exception 1).
        """
        found = []
        for write in writes:
            group = self._keys.group_of(write.key)
            if group is not None and not write.key.startswith(self._times):
                child = write.key.startswith(self._children)
                found.append(self._keys.children_of(group) if child else write.key)
        return found
