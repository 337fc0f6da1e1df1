"""The rules by name, and what the model takes from the product itself: guards, groups, batches.

A rule that is switched off is left out of the model's steps; the explorer must then find what it is there for. Where
the product's code is pure it is run as it is: `Delegations.guards` compares, `Group` keeps, `GroupCommit` gathers.
"""

from __future__ import annotations

from functools import cache, lru_cache

from apollofs.metadata.delegations import Delegations
from apollofs.metadata.group_commit import GroupCommit, Request
from apollofs.metadata.groups import Group
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import MountRecord
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.store import Compare, KeyValue, Put, Relation, Target
from tests.model.protocol.state import COUNT, NAME, Cached, GroupState, Key, Mutation

RULES = {
    "writers_first": "no delegation is taken while a writer waits for that group",
    "own_claim": "operations of one mount that wait for the same group each have a key that says so",
    "guard": "a transaction compares that nobody else holds what it changes",
    "cache_before_key": "a recalled holder drops its cache before it deletes its key",
    "no_take_while_returning": "no delegation is taken while the deletion of one's own key is under way",
    "no_take_at_birth": "a directory that is being made here is not taken besides",
    "poison": "a recall that overtakes the reply of an acquisition poisons it",
    "proven": "what is cached is used only while the lease is proven",
    "proof_from_sending": "validity ends here before the lease ends there",
    "drop_with_session": "with the session everything that was cached goes",
    "session_of_reply": "an acquisition of an earlier session holds nothing",
    "pending": "what a write in flight changes is not answered from the cache",
    "own_write": "an own write is kept in the cache when its transaction has returned",
    "own_write_while_taking": "own writes that return before the reply of an acquisition are kept with it",
    "doubt": "nothing is held while a transaction that was given up may still be applied",
    "settle": "a slot in doubt is settled, so that the copy on its way dies, before anything is held again",
    "held_since": "a reply is kept only if the group has been held since its revision",
    "newest": "what is known as of an older revision never replaces what is newer",
    "fence": "a transaction is applied only while its session's slot exists",
    "once": "a transaction that is sent again is not applied again",
    "lost_in_doubt": "an operation whose session ended while a copy was in doubt is not reported as not done",
    "batch_apart": "operations that touch each other's keys do not share a transaction",
    "batch_unknown": "the members of a batch whose outcome is unknown do not go alone",
    "lock_lease": "a lock ends with its session",
    "lock_session": "what was prepared under a lock commits in the session that holds it, or not at all",
    "hearing": "nothing is taken while the inbox of recalls can't be read",
    "kernel_before_key": "the kernel drops what it has of a group before the key goes",
    "kernel_held": "the kernel may keep only what is held",
    "kernel_proven": "the kernel may keep nothing for longer than the lease is proven",
    "kernel_receipts": "a reply that is still on its way into the kernel is waited for, then dropped too",
    "hurry": "what an operation that waits for others has locked, the kernel drops without a lock",
}
KEYS = Keys("model")


@cache
def product() -> tuple[Delegations, GroupCommit]:
    """The product's own objects, of which only what is pure is called."""
    return Delegations(MemoryStore(), KEYS, enabled=True, write_back=True, wait_s=1), GroupCommit(KEYS)


@cache
def session_of(number: int) -> Session:
    return Session(MemoryStore(), KEYS, SessionOptions(), MountRecord(number, "", 0, "", "", "", 0), 1)


def ino_of(directory: int) -> int:
    return 100 + directory


@cache
def product_key(index: int, key: Key) -> bytes:
    """How the product spells a key of the model; `index` tells names of one directory apart."""
    directory = ino_of(key.directory)
    if key.kind == NAME:
        return KEYS.dentry(directory, b"%d" % index)
    return KEYS.child(directory, 1000 + index) if key.kind == COUNT else KEYS.inode(directory)


def writes_of(keys: tuple[Key, ...], mutations: tuple[Mutation, ...]) -> list[Put]:
    return [Put(product_key(key, keys[key]), b"") for mutation in mutations for key in mutation.writes]


@lru_cache(maxsize=100_000)
def others_holding(
    held: frozenset[tuple[int, int]], session: int, keys: tuple[Key, ...], mutations: tuple[Mutation, ...]
) -> frozenset[int]:
    """The directories on which the compares of the product's transaction fail, given who holds what."""
    present = {KEYS.delegation(ino_of(directory), holder): directory for directory, holder in held}
    born = [ino_of(mutation.born) for mutation in mutations if mutation.born >= 0]
    compares, _ = product()[0].guards(session_of(session), writes_of(keys, mutations), born[0] if born else 0)
    for compare in compares:
        assert (compare.target, compare.relation, compare.operand) == (Target.CREATE, Relation.EQUAL, 0)
    return frozenset(
        directory for key, directory in present.items() if any(c.key <= key < c.range_end for c in compares)
    )


@cache
def go_together(keys: tuple[Key, ...], mutations: tuple[Mutation, ...]) -> bool:
    """Whether the product's group commit lets these operations share a transaction."""
    requests = [_request(keys, mutation) for mutation in mutations]
    gather = product()[1]
    for at, request in enumerate(requests[1:], 1):
        written = {key for other in requests[:at] for key in gather._written(other)}
        if gather._touches(request, written, requests[:at]):
            return False
    return True


def _request(keys: tuple[Key, ...], mutation: Mutation) -> Request:
    writes = writes_of(keys, (mutation,))
    compares, _ = product()[0].guards(session_of(1), writes, 0)
    if mutation.exclusive:
        compares += [Compare(write.key, Target.MOD, Relation.EQUAL, 0) for write in writes]
    return Request(session_of(1), compares, writes, None, 0, ())


# -- what a group keeps: the product's Group, thawed and frozen --------------------------------------------------------


def taken(revision: int, keys: int) -> GroupState:
    """A group held since `revision`, of which nothing is known."""
    return GroupState(revision, (None,) * keys, None, 0, 0, False)


def born(revision: int, keys: int) -> GroupState:
    """A group held since it was made: known to be empty."""
    return taken(revision, keys)._replace(children=0, children_revision=revision, complete=True)


def known(state: GroupState, index: int, key: Key) -> int | None:
    """The version of a key as it is cached; None if it isn't."""
    if key.kind == COUNT:
        return state.children
    found = state.known[index]
    if found is not None:
        return found.version
    return 0 if state.complete and key.kind == NAME else None


@lru_cache(maxsize=100_000)
def learnt(state: GroupState, index: int, key: Key, cached: Cached, newest: bool = True) -> GroupState:
    """The group after a read of a key has been kept. Without `newest` even what is older replaces what is known."""
    group = _thaw(state)
    if not newest:
        group.known.pop(b"%d" % index, None)
        group.children_revision = group.children_changed = 0
    if key.kind == COUNT:
        group.count(cached.version, cached.revision)
    else:
        group.learn(b"%d" % index, _value(cached), cached.revision)
    return _freeze(group, len(state.known))


@lru_cache(maxsize=100_000)
def written(state: GroupState, index: int, key: Key, cached: Cached) -> GroupState:
    """The group after an own write of a key has been kept, as `Delegations._apply` does."""
    if cached.revision < state.taken:
        return state
    group = _thaw(state)
    if key.kind == COUNT:
        group.change_children(1, cached.revision)
    else:
        group.learn(b"%d" % index, _value(cached), cached.revision)
    return _freeze(group, len(state.known))


@lru_cache(maxsize=100_000)
def settled(state: GroupState) -> GroupState:
    """The same group while nothing as of an earlier revision is on its way: all that comes will be newer."""
    known_at_all = tuple(cached and Cached(cached.version, 0) for cached in state.known)
    return GroupState(0, known_at_all, state.children, 0, 0, state.complete)


def _value(cached: Cached) -> KeyValue:
    return KeyValue(b"", b"%d" % cached.version, 0, cached.revision, 0)


def _thaw(state: GroupState) -> Group:
    group = Group(0, state.taken, {}, state.children, state.children_revision, state.children_changed, state.complete)
    for index, cached in enumerate(state.known):
        if cached is not None:
            group.known[b"%d" % index] = (_value(cached), cached.revision)
    return group


def _freeze(group: Group, keys: int) -> GroupState:
    found: list[Cached | None] = [None] * keys
    for name, (kv, revision) in group.known.items():
        assert kv is not None
        found[int(name)] = Cached(int(kv.value), revision)
    return GroupState(
        group.taken_revision,
        tuple(found),
        group.children,
        group.children_revision,
        group.children_changed,
        group.complete,
    )
