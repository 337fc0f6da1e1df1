"""What a mount caches of the directory groups that it holds delegations on.

A group is a directory's own `i/`, `t/` and count of `c/`, and its dentries with the inodes embedded in them. Pure
state, no I/O; `delegations.py` decides when a group is held. Every saying has the revision as of which it is true, and
an older one never replaces a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Inode
from apollofs.metadata.store import Compare, Delete, KeyValue, Put, Range, Relation, Target, prefix_end

QUEUED = 1 << 63
"""As of when a write is true that was answered and is not in the store yet: later than all that is read before."""


@dataclass(slots=True)
class Group:
    """One held group. Nobody else has changed it since `taken_revision`, nor will while it is held."""

    ino: int
    taken_revision: int
    known: dict[bytes, tuple[KeyValue | None, int]] = field(default_factory=dict)
    children: int | None = None
    """How many subdirectories there are: as counted at `children_revision`, and changed by own writes since. A count
    that is older than the last such write is ignored, as it can't be told which writes it has seen."""
    children_revision: int = 0
    children_changed: int = 0
    complete: bool = False
    """Every dentry there is, is known."""
    paged: tuple[bytes, int] | None = None
    """All dentries before this key are known as of this revision, from the first pages of a listing."""
    answers: int = 0
    """How often it was asked for."""
    answers_before: int = -1
    """The same, when it was last thought of giving back."""
    seal: int = 0
    """The number of the seal under which it is held; 0: by a delegation."""
    exclusive: bool = False
    """Nobody else holds it, nor reads it from the store, until it is shared again (`ahead.py`)."""
    changed_at: float = 0.0
    """When this mount last changed it ahead of the store, by trio's clock."""
    exclusion_asked: int = 0
    """The number of the transaction under way that makes it so, if nobody has wanted the group since it was sent."""
    in_turns: bool = False
    """Other mounts change it too, and each has its turn (`turns.py`). This one's lasts until `turn_until` at most, by
    trio's clock, once another waits."""
    turn_until: float = 0.0
    changes: int = 0
    """How many operations of this mount have changed it while it was not exclusive."""
    changed: bool = False
    """This mount has changed it."""
    attributes: tuple[tuple[KeyValue, KeyValue | None, int], Inode] | None = None
    """The directory's attributes, and the records that they were put together from."""

    def learn(self, key: bytes, kv: KeyValue | None, revision: int) -> None:
        held = self.known.get(key)
        if held is None or held[1] <= revision:
            self.known[key] = (kv, revision)

    def count(self, children: int, revision: int) -> None:
        if revision >= max(self.children_revision, self.children_changed):
            self.children, self.children_revision = children, revision

    def change_children(self, difference: int, revision: int) -> None:
        self.children_changed = max(self.children_changed, revision)
        if self.children is not None and revision > self.children_revision:
            self.children += difference


@dataclass(slots=True)
class Acquisition:
    """A delegation that was asked for. A recall that comes before the reply poisons it; own writes that are through
    before it are kept, as what was read with it may be older. What is to be exclusive, for a turn or from birth, and
    must be shared before the reply, is `shared` already then."""

    poisoned: bool = False
    shared: bool = False
    writes: list[tuple[Put | Delete, int]] = field(default_factory=list)


@dataclass(slots=True)
class Claim:
    """That one operation waits for others' delegations to end. `groups`: what it changes, and the kernel has locked."""

    ticket: int
    groups: dict[int, None] = field(default_factory=dict)
    waits: dict[bytes, Delete] = field(default_factory=dict)
    """The keys in the store that say so; the operation's own transaction deletes them."""
    since: int = 0
    """As of which revision it stands in line for a turn."""


def groups_written(keys: Keys, writes: Iterable[Put | Delete]) -> dict[int, None]:
    """The groups that a transaction changes, in order of appearance."""
    found: dict[int, None] = {}
    for write in writes:
        group = keys.group_of(write.key)
        if group is not None:
            found[group] = None
    return found


def guards(keys: Keys, session: int, writes: Sequence[Put | Delete], born: int) -> tuple[list[Compare], list[Range]]:
    """What a transaction of `session` compares so that nobody else holds what it changes, but for the directory that it
    makes (`born`), and reads if it fails: of each group who holds it, and who does exclusively."""
    compares: list[Compare] = []
    questions: list[Range] = []
    for group in groups_written(keys, writes):
        if group == born:
            continue
        prefix, exclusives = keys.delegations_on(group), keys.exclusives_on(group)
        mine = keys.delegation(group, session)
        compares.append(Compare(prefix, Target.CREATE, Relation.EQUAL, 0, mine))
        compares.append(Compare(mine + b"\0", Target.CREATE, Relation.EQUAL, 0, prefix_end(prefix)))
        questions.append(Range(prefix, prefix_end(prefix), keys_only=True))
        questions.append(Range(exclusives, prefix_end(exclusives), limit=1, keys_only=True))
    return compares, questions
