"""What a mount believes of the others' locks: reads and events in any order never take it back in time."""

from __future__ import annotations

import pytest

from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_picture import SOLE_OWNER, Keeper, Picture, Places, Waiting
from apollofs.metadata.lock_records import (
    RANGE_END,
    Arrival,
    Lock,
    LockKind,
    LockType,
    encode_held,
    encode_sole,
    encode_waiting,
)
from apollofs.metadata.store import Compare, Event, KeyValue, Relation, Target, prefix_end

KEYS = Keys("test")
INO, ME, OTHER = 9, 5, 6
PLACES = Places(KEYS, INO, LockKind.POSIX, ME)


def lock(session: int, start: int) -> Lock:
    return Lock(session, 1, start, start, LockType.SHARED, 1)


def held_by(session: int, revision: int, *starts: int) -> KeyValue:
    value = encode_held(session, [lock(session, start) for start in starts])
    return KeyValue(KEYS.locks(INO, LockKind.POSIX, session), value, revision, revision, 1)


def waiting_of(session: int, revision: int, ticket: int) -> KeyValue:
    key = KEYS.lock_waiter(INO, LockKind.POSIX, session, ticket)
    return KeyValue(key, encode_waiting(lock(session, ticket)), revision, revision, 1)


def gone(kv: KeyValue, revision: int) -> Event:
    return Event(True, KeyValue(kv.key, b"", 0, revision, 0))


def test_only_others_are_in_it() -> None:
    picture = Picture(PLACES)
    kvs = [held_by(ME, 3, 1), held_by(OTHER, 4, 2), waiting_of(ME, 5, 7), waiting_of(OTHER, 6, 8)]
    picture.replace(6, kvs)
    assert list(picture.held) == [lock(OTHER, 2)]
    assert list(picture.waiting) == [Waiting(Arrival(6), lock(OTHER, 8), kvs[3].key)]
    assert not picture.alone


def test_who_decides_alone_holds_all_there_is_until_it_tells() -> None:
    picture = Picture(PLACES)
    key = KEYS.locks(INO, LockKind.POSIX, OTHER)
    picture.replace(10, [KeyValue(key, encode_sole(OTHER), 3, 9, 2)])
    assert picture.keeper == Keeper(OTHER, key, 9)
    assert list(picture.held) == [Lock(OTHER, SOLE_OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 0)]
    picture.apply(11, [Event(False, held_by(OTHER, 11, 2))])
    assert [picture.keeper, *picture.held] == [None, lock(OTHER, 2)]
    picture.apply(12, [Event(False, KeyValue(key, encode_sole(OTHER), 3, 12, 4))])
    assert picture.keeper == Keeper(OTHER, key, 12)
    picture.apply(13, [gone(held_by(OTHER, 12), 13)])
    assert [picture.keeper, picture.alone] == [None, True]


def test_requests_that_came_while_their_session_decided_alone_keep_their_place() -> None:
    picture = Picture(PLACES)
    early = waiting_of(OTHER, 20, 5)._replace(value=encode_waiting(lock(OTHER, 5), Arrival(4, 5)))
    late = waiting_of(OTHER, 6, 8)
    picture.replace(20, [early, late])
    assert sorted(each.arrival for each in picture.waiting) == [Arrival(4, 5), Arrival(6)]


def test_what_is_known_already_is_passed_over() -> None:
    picture = Picture(PLACES)
    picture.replace(10, [held_by(OTHER, 10, 2)])
    old = held_by(OTHER, 8, 1)
    picture.apply(9, [Event(False, old), gone(old, 9)])
    assert (picture.revision, list(picture.held)) == (10, [lock(OTHER, 2)])
    picture.replace(9, [])
    assert (picture.revision, list(picture.held)) == (10, [lock(OTHER, 2)])
    picture.apply(12, [gone(old, 12)])
    assert (picture.revision, list(picture.held)) == (12, [])


def test_a_broken_record_leaves_it_as_it_is() -> None:
    picture = Picture(PLACES)
    picture.replace(10, [held_by(OTHER, 10, 2)])
    with pytest.raises(CorruptRecord):
        picture.replace(11, [KeyValue(KEYS.locks(INO, LockKind.POSIX, 3), b"\xc1", 11, 11, 1)])
    assert (picture.revision, list(picture.held)) == (10, [lock(OTHER, 2)])


@pytest.mark.parametrize("queued", [False, True])
def test_compares_see_every_key_of_others_that_matters(queued: bool) -> None:
    compares = PLACES.others_unchanged_since(10, queued=queued)
    cases = {
        KEYS.locks(INO, LockKind.POSIX, ME - 1): True,
        KEYS.locks(INO, LockKind.POSIX, ME): False,
        KEYS.locks(INO, LockKind.POSIX, OTHER): True,
        KEYS.lock_waiter(INO, LockKind.POSIX, ME - 1, 3): not queued,
        KEYS.lock_waiter(INO, LockKind.POSIX, ME, 0): False,
        KEYS.lock_waiter(INO, LockKind.POSIX, ME, (1 << 64) - 1): False,
        KEYS.lock_waiter(INO, LockKind.POSIX, OTHER, 0): not queued,
        KEYS.locks(INO, LockKind.FLOCK, OTHER): False,
        KEYS.locks(INO + 1, LockKind.POSIX, OTHER): False,
    }
    for key, seen in cases.items():
        assert any(_covers(compare, key) for compare in compares) == seen
    assert all(compare.range_end <= prefix_end(PLACES.all) for compare in compares)


def _covers(compare: Compare, key: bytes) -> bool:
    assert (compare.target, compare.relation, compare.operand) == (Target.MOD, Relation.LESS, 11)
    return compare.key <= key < compare.range_end
