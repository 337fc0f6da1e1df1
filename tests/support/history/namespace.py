"""What each operation does to a small namespace, and what it may see of it.

Rules, as docs/POSIX.md has them
1. A change of names is one step. An inode is called by the number of the operation that made it.
2. Looking through a name is two steps: which inode the name means, then that inode, which may have changed or lost its
   name since.
3. An append is seen on its own host from its write on, everywhere once it is committed. An inode without a name takes
   no commit any more: what is appended to it then is seen on that host alone.
4. While a call of a host is in flight, and until it returns, processes of the same host may still see what was before
   it (exception 1). Not what was before somebody else's change: that other mount had to wait until this host's kernel
   had dropped what it knew.
5. The kernel looks up both names of a rename, one after the other; if they mean the same file, which somebody else has
   renamed so meanwhile, it does nothing and calls it done (exception 5).
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from typing import NamedTuple

from tests.support.history.records import TOKEN_BYTES, Kind, Operation

Body = tuple[int, ...]


class Former(NamedTuple):
    """What a name (`key`) meant, or an inode held, before a call of `host` that returned at `until_s`."""

    key: str | int
    value: int | Body
    host: str
    until_s: float


class State(NamedTuple):
    """The namespace between two steps."""

    names: tuple[tuple[str, int], ...] = ()
    """Name and inode, sorted; only names that are there."""
    bodies: tuple[tuple[int, Body], ...] = ()
    """Inode and tokens, sorted."""
    local: frozenset[tuple[int, str, int]] = frozenset()
    """Inode, host and token of each append to an inode that had no name any more."""
    former: frozenset[Former] = frozenset()

    def inode(self, name: str) -> int:
        """0: no such name."""
        return dict(self.names).get(name, 0)

    def is_named(self, inode: int) -> bool:
        return any(inode == each for _, each in self.names)

    def body(self, inode: int) -> Body:
        return dict(self.bodies)[inode]


# -- seeing ----------------------------------------------------------------------------------------------------------


def _former(state: State, key: str | int, operation: Operation) -> Iterator[int | Body]:
    for former in state.former:
        if former.key == key and former.host == operation.host and operation.invoked_s < former.until_s:
            yield former.value


def meanings(state: State, operation: Operation, name: str) -> set[int]:
    """What the operation may take a name for now: inodes, 0 for none."""
    return {state.inode(name), *(value for value in _former(state, name, operation) if isinstance(value, int))}


def is_explained(
    state: State, operation: Operation, known: Collection[int], staged: Collection[tuple[int, int]]
) -> bool:
    """Whether the state, now, explains all that an operation that only looks has seen.

    `known`: the inodes that it may have taken its name for. `staged`: inode and token of each append that is under way
    on its host.
    """
    if operation.error == errno.ENOENT:
        return 0 in meanings(state, operation, operation.names[0])
    if operation.error == errno.EEXIST:
        return any(meanings(state, operation, operation.names[0]))
    return any(_shows(state, operation, inode, {token for each, token in staged if each == inode}) for inode in known)


def _shows(state: State, operation: Operation, inode: int, staged: set[int]) -> bool:
    """Whether the body of an inode is what was seen: one that is committed, and behind it what is this host's own."""
    own = staged | {token for each, host, token in state.local if (each, host) == (inode, operation.host)}
    bodies = [state.body(inode), *(each for each in _former(state, inode, operation) if isinstance(each, tuple))]
    for body in bodies:
        if operation.kind is Kind.STAT:
            more, rest = divmod(operation.size - len(body) * TOKEN_BYTES, TOKEN_BYTES)
            if not rest and 0 <= more <= len(own - set(body)):
                return True
        else:
            more_tokens = operation.tokens[len(body) :]
            fresh = len(set(more_tokens)) == len(more_tokens) and set(more_tokens) <= own - set(body)
            if operation.tokens[: len(body)] == body and fresh:
                return True
    return False


# -- changing --------------------------------------------------------------------------------------------------------


def changed(state: State, operation: Operation, found: Collection[int]) -> Iterator[State]:
    """The states in which an operation that was done may leave this one; none if it can't have been done now.

    `found`: the inodes that it may have taken its first name for, since it was called.
    """
    name, here = operation.names[0], state.inode(operation.names[0])
    match operation.kind:
        case Kind.CREATE if not here:
            yield _named(_with_body(state, operation.number, ()), operation, name, operation.number)
        case Kind.UNLINK if here:
            yield _named(state, operation, name, 0)
        case Kind.RENAME:
            if here:
                yield _named(_named(state, operation, operation.names[1], here), operation, name, 0)
            if meanings(state, operation, operation.names[1]) & {*found}:
                yield state
        case Kind.REPLACE:
            made = _with_body(state, operation.number, (operation.number,))
            yield _named(made, operation, name, operation.number)
        case Kind.APPEND:
            for inode in found:
                yield _appended(state, operation, inode)


def _named(state: State, operation: Operation, name: str, inode: int) -> State:
    names = {**dict(state.names), name: inode}
    former = _with_former(state, operation, name, state.inode(name))
    return state._replace(names=tuple(sorted(item for item in names.items() if item[1])), former=former)


def _with_body(state: State, inode: int, body: Body) -> State:
    return state._replace(bodies=tuple(sorted({**dict(state.bodies), inode: body}.items())))


def _appended(state: State, operation: Operation, inode: int) -> State:
    if not state.is_named(inode):
        return state._replace(local=state.local | {(inode, operation.host, operation.number)})
    body = state.body(inode)
    former = _with_former(state, operation, inode, body)
    return _with_body(state, inode, (*body, operation.number))._replace(former=former)


def _with_former(state: State, operation: Operation, key: str | int, value: int | Body) -> frozenset[Former]:
    kept = {each for each in state.former if each.key != key or each.host == operation.host}
    return frozenset(kept | {Former(key, value, operation.host, operation.returned_s)})


# -- forgetting ------------------------------------------------------------------------------------------------------


def without_the_past(state: State, former: frozenset[Former], known: Collection[int]) -> State:
    """The same state with only those of its former values, and without inodes that nobody can see any more: no name
    means them and they are not in `known`."""
    seen = {inode for _, inode in state.names} | set(known)
    seen |= {each.value for each in former if isinstance(each.value, int)}
    return State(
        state.names,
        tuple(item for item in state.bodies if item[0] in seen),
        frozenset(item for item in state.local if item[0] in seen),
        former,
    )
