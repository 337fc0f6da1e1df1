"""Locks as values: which conflict, what one owner holds after a lock or an unlock, and who stands in whose way.

Pure functions; nothing here waits or asks the store. What one session holds is a tuple of locks, sorted by owner and
start, in which an owner's ranges neither overlap nor, if of one type, touch (fcntl(2): ranges split and merge).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from apollofs.metadata.lock_records import Lock, LockType


def same_owner(one: Lock, other: Lock) -> bool:
    """Owner numbers mean something within their session only."""
    return one.owner == other.owner and one.session == other.session


def overlap(one: Lock, other: Lock) -> bool:
    return one.start <= other.end and other.start <= one.end


def conflict(one: Lock, other: Lock) -> bool:
    """Whether the two can't be held at once."""
    return (
        overlap(one, other)
        and (one.type is LockType.EXCLUSIVE or other.type is LockType.EXCLUSIVE)
        and not same_owner(one, other)
    )


def covers(held: Iterable[Lock], wanted: Lock) -> bool:
    """Whether `wanted` would change nothing: its owner holds the whole range already, in that type."""
    return any(
        lock.start <= wanted.start and wanted.end <= lock.end and lock.type is wanted.type and same_owner(lock, wanted)
        for lock in held
    )


def weakens(held: Iterable[Lock], wanted: Lock) -> bool:
    """Whether `wanted` makes shared what its owner holds exclusively: others are waiting to hear of that."""
    return wanted.type is LockType.SHARED and any(
        lock.type is LockType.EXCLUSIVE and overlap(lock, wanted) and same_owner(lock, wanted) for lock in held
    )


def subtract(held: Iterable[Lock], owner: int, start: int, end: int) -> tuple[Lock, ...]:
    """What is held after `owner` has given back [start, end]; a range that reaches out on both sides is split."""
    left: list[Lock] = []
    for lock in held:
        if lock.owner != owner or lock.end < start or lock.start > end:
            left.append(lock)
            continue
        if lock.start < start:
            left.append(replace(lock, end=start - 1))
        if lock.end > end:
            left.append(replace(lock, start=end + 1))
    return tuple(left)


def add(held: Iterable[Lock], wanted: Lock) -> tuple[Lock, ...]:
    """What is held after `wanted` has been granted: it replaces its owner's locks in the range, whatever their type,
    and merges with those of its type that it touches."""
    merged = wanted
    rest: list[Lock] = []
    for lock in subtract(held, wanted.owner, wanted.start, wanted.end):
        touches = lock.owner == wanted.owner and (lock.end + 1 == wanted.start or wanted.end + 1 == lock.start)
        if touches and lock.type is wanted.type:
            merged = replace(merged, start=min(merged.start, lock.start), end=max(merged.end, lock.end))
        else:
            rest.append(lock)
    rest.append(merged)
    rest.sort(key=lambda lock: (lock.owner, lock.start))
    return tuple(rest)


def blockers(wanted: Lock, holders: Iterable[Lock], ahead: Iterable[Lock]) -> Iterator[Lock]:
    """What `wanted` must wait for: first the conflicting holders, then the conflicting requests that came earlier.

    `ahead` are the requests that wait and came before, oldest first. Those that themselves wait for this owner,
    directly or behind one that does, are passed over: to wait for them would be to wait for ever.
    """
    own: list[Lock] = []
    for lock in holders:
        if conflict(wanted, lock):
            yield lock
        elif same_owner(wanted, lock):
            own.append(lock)
    for request in ahead:
        if own and any(conflict(request, lock) for lock in own):
            own.append(request)
        elif conflict(wanted, request):
            yield request
