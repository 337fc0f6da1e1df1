"""What owners hold, against a model that keeps each byte by itself; who blocks whom; records."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord, TooManyLocks
from apollofs.metadata.lock_ranges import add, blockers, conflict, covers, subtract
from apollofs.metadata.lock_records import (
    RANGE_END,
    RANGES_MAX,
    RECORD_BYTES_MAX,
    Arrival,
    Holding,
    Lock,
    LockType,
    decode_held,
    decode_waiting,
    encode_held,
    encode_sole,
    encode_waiting,
)

SHARED, EXCLUSIVE = LockType.SHARED, LockType.EXCLUSIVE
BYTES = 12
SESSION = 5

ranges = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(lambda pair: (min(pair), max(pair)))
steps = st.tuples(st.integers(1, 3), ranges, st.sampled_from([SHARED, EXCLUSIVE, None]))
Model = dict[tuple[int, int], LockType]


def lock(owner: int, start: int, end: int, type_: LockType = EXCLUSIVE, session: int = SESSION) -> Lock:
    return Lock(session, owner, start, end, type_, owner)


def bytes_of(held: tuple[Lock, ...]) -> Model:
    found: Model = {}
    for each in held:
        for byte in range(each.start, each.end + 1):
            assert (each.owner, byte) not in found, "an owner's ranges overlap"
            found[each.owner, byte] = each.type
    return found


def apply(held: tuple[Lock, ...], model: Model, step: tuple[int, tuple[int, int], LockType | None]) -> tuple[Lock, ...]:
    owner, (start, end), type_ = step
    for byte in range(start, end + 1):
        model.pop((owner, byte), None)
        if type_ is not None:
            model[owner, byte] = type_
    return subtract(held, owner, start, end) if type_ is None else add(held, lock(owner, start, end, type_))


@given(st.lists(steps, max_size=30))
def test_locks_split_merge_and_replace_as_bytes_do(history: list[tuple[int, tuple[int, int], LockType | None]]) -> None:
    held: tuple[Lock, ...] = ()
    model: Model = {}
    for step in history:
        held = apply(held, model, step)
        assert bytes_of(held) == model
        assert list(held) == sorted(held, key=lambda each: (each.owner, each.start))
        for one, next_ in itertools.pairwise(held):
            apart = one.owner != next_.owner or one.end + 1 < next_.start or one.type is not next_.type
            assert apart, "neighbours of one type are not merged"


@given(st.lists(steps, max_size=15), st.integers(1, 3), ranges, st.sampled_from([SHARED, EXCLUSIVE]))
def test_covers_and_conflicts_as_bytes_do(
    history: list[tuple[int, tuple[int, int], LockType | None]], owner: int, place: tuple[int, int], type_: LockType
) -> None:
    held: tuple[Lock, ...] = ()
    model: Model = {}
    for step in history:
        held = apply(held, model, step)
    wanted = lock(owner, *place, type_)
    inside = range(place[0], place[1] + 1)
    assert covers(held, wanted) == all(model.get((owner, byte)) is type_ for byte in inside)
    against = {
        other
        for (other, byte), theirs in model.items()
        if other != owner and byte in inside and EXCLUSIVE in (theirs, type_)
    }
    assert {each.owner for each in held if conflict(each, wanted)} == against


def test_the_same_number_in_another_session_is_another_owner() -> None:
    assert conflict(lock(1, 0, 5), lock(1, 5, 9, session=6))
    assert not covers((lock(1, 0, 5, session=6),), lock(1, 0, 5))


def test_holders_block_first_then_earlier_requests() -> None:
    holder, before = lock(1, 0, 4), lock(2, 3, 9)
    assert list(blockers(lock(3, 4, 9), [holder], [before])) == [holder, before]
    assert list(blockers(lock(3, 10, 19), [holder], [before])) == []
    assert list(blockers(lock(3, 0, 9, SHARED), [lock(1, 0, 4, SHARED)], [lock(2, 0, 9, SHARED)])) == []


def test_requests_that_wait_for_the_asker_are_passed_over() -> None:
    mine, behind, far_behind, stranger = lock(1, 0, 9), lock(2, 5, 15), lock(3, 12, 20), lock(4, 18, 30)
    assert list(blockers(lock(1, 10, 19), [mine], [behind, far_behind])) == []
    assert list(blockers(lock(1, 10, 29), [mine], [stranger, behind, far_behind])) == [stranger]


def test_records() -> None:
    held = (lock(1, 0, RANGE_END), lock((1 << 64) - 1, 3, 4, SHARED))
    assert decode_held(encode_held(SESSION, held)) == Holding(SESSION, held, False)
    assert decode_held(encode_sole(SESSION)) == Holding(SESSION, (), True)
    assert decode_waiting(encode_waiting(held[1])) == (held[1], None)
    assert decode_waiting(encode_waiting(held[1], Arrival(7, 3))) == (held[1], Arrival(7, 3))


@pytest.mark.parametrize("fields", [[], [1], [1, [[1, 2]]], [1, [[1, 2, 3, 7, 5]]], [1, 2]])
def test_broken_records(fields: list[object]) -> None:
    data = codec.encode_fields(fields)
    with pytest.raises(CorruptRecord):
        decode_held(data)
    with pytest.raises(CorruptRecord):
        decode_waiting(data)


def test_too_many_locks() -> None:
    scattered = tuple(lock(1, 2 * number, 2 * number) for number in range(RANGES_MAX))
    assert len(encode_held(SESSION, scattered)) < RECORD_BYTES_MAX
    with pytest.raises(TooManyLocks):
        encode_held(SESSION, (*scattered, lock(2, 0, 0)))
    big = tuple(Lock(SESSION, (1 << 64) - 1 - n, 1 << 62, RANGE_END, SHARED, 1 << 60) for n in range(RANGES_MAX))
    assert len(big) == RANGES_MAX
    encode_held(SESSION, big)
