"""Which checkpoints go, for random steps, holds and policies."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from apollofs.fs.retention.verdicts import MAY_BE_INCOMPLETE, Checkpoint, Hold, Verdict, Why, decide
from apollofs.fs.sizing.retaining import Kept, must_keep
from apollofs.fs.sizing.retaining import Policy as Planned
from apollofs.metadata.retention import Retention

NOW_S = 1e6
HOLDS = [Why.INCOMPLETE, Why.OPEN, Why.SILENT, Why.NAMED, Why.SEALED, Why.IMMUTABLE, Why.UNFIT]
FREE = st.one_of(st.none(), st.integers(-500, 2000))
POLICIES = st.builds(
    Retention,
    last=st.integers(1, 5),
    every=st.sampled_from([0, 1, 2, 5, 10]),
    keep_for_s=st.sampled_from([0, 1, 100, 5000]),
    min_free_bytes=st.sampled_from([0, 1, 500, 3000]),
    capacity_bytes=st.just(10_000),
    settle_s=st.sampled_from([0, 10, 1000]),
)
CHECKPOINTS = st.lists(
    st.builds(
        Checkpoint,
        directory=st.integers(1, 3),
        step=st.integers(0, 40),
        kinds=st.sampled_from([(b"a",), (b"b",), (b"a", b"b")]),
        changed_s=st.integers(0, 10_000).map(lambda age: NOW_S - age),
        size_bytes=st.integers(0, 300),
        hold=st.one_of(st.none(), st.none(), st.sampled_from(HOLDS).map(Hold)),
    ),
    max_size=30,
    unique_by=lambda each: (each.directory, each.step),
)


def is_counted(checkpoint: Checkpoint, policy: Retention) -> bool:
    if checkpoint.hold is not None:
        return checkpoint.hold.why not in MAY_BE_INCOMPLETE
    return NOW_S - checkpoint.changed_s >= policy.settle_s


def going(verdicts: list[Verdict]) -> list[Checkpoint]:
    return [each.checkpoint for each in verdicts if each.goes]


@given(CHECKPOINTS, FREE, POLICIES)
def test_what_is_held_and_the_newest_complete_ones_stay(
    checkpoints: list[Checkpoint], free: int | None, policy: Retention
) -> None:
    verdicts = decide(checkpoints, NOW_S, free, policy)
    assert [each.checkpoint for each in verdicts] == checkpoints
    gone = going(verdicts)
    assert all(each.hold is None and NOW_S - each.changed_s >= policy.settle_s for each in gone)
    counted = [each for each in checkpoints if is_counted(each, policy)]
    for directory, kind in {(each.directory, kind) for each in counted for kind in each.kinds}:
        series = [each for each in counted if each.directory == directory and kind in each.kinds]
        for last in (
            sorted(series, key=lambda each: each.step)[-policy.last :],
            sorted(series, key=lambda each: (each.changed_s, each.step))[-policy.last :],
        ):
            assert not set(map(id, last)) & set(map(id, gone))


@given(CHECKPOINTS, POLICIES)
def test_numbers_and_ages_hold_while_there_is_room(checkpoints: list[Checkpoint], policy: Retention) -> None:
    for free in (None, policy.min_free_bytes):
        verdicts = decide(checkpoints, NOW_S, free, policy)
        for each in going(verdicts):
            is_old = bool(policy.keep_for_s) and NOW_S - each.changed_s > policy.keep_for_s
            assert not policy.every or each.step % policy.every or is_old
        for verdict in verdicts:
            assert verdict.goes == (verdict.why is Why.GOES)


@given(CHECKPOINTS, st.integers(-500, 2000), POLICIES)
def test_for_room_the_oldest_go_first_and_no_more_than_needed(
    checkpoints: list[Checkpoint], free: int, policy: Retention
) -> None:
    verdicts = decide(checkpoints, NOW_S, free, policy)
    squeezed = [each.checkpoint for each in verdicts if each.why is Why.SPACE]
    spared = [each.checkpoint for each in verdicts if each.why is Why.EVERY]
    gone = sum(each.size_bytes for each in going(verdicts))
    if squeezed:
        newest = max(squeezed, key=lambda each: (each.changed_s, each.step))
        assert free + gone - newest.size_bytes < policy.min_free_bytes
        assert all((each.changed_s, each.step) >= (newest.changed_s, newest.step) for each in spared)
    if policy.min_free_bytes and policy.min_free_bytes > free + gone:
        assert not spared


@given(CHECKPOINTS, FREE, POLICIES)
def test_a_second_run_has_nothing_to_do(checkpoints: list[Checkpoint], free: int | None, policy: Retention) -> None:
    gone = going(decide(checkpoints, NOW_S, free, policy))
    left = [each for each in checkpoints if each not in gone]
    after = None if free is None else free + sum(each.size_bytes for each in gone)
    assert going(decide(left, NOW_S, after, policy)) == []


@given(CHECKPOINTS, FREE, POLICIES, st.randoms())
def test_their_order_does_not_matter(
    checkpoints: list[Checkpoint], free: int | None, policy: Retention, rng: object
) -> None:
    distinct = [replace(each, changed_s=each.changed_s + at / 1000) for at, each in enumerate(checkpoints)]
    mixed = list(distinct)
    rng.shuffle(mixed)  # type: ignore[attr-defined]

    def gone(among: list[Checkpoint]) -> set[tuple[int, int]]:
        return {(each.directory, each.step) for each in going(decide(among, NOW_S, free, policy))}

    assert gone(distinct) == gone(mixed)


@given(st.lists(st.integers(1, 500), max_size=30), POLICIES)
def test_it_is_what_the_plan_reckons_with(ages: list[int], policy: Retention) -> None:
    policy = replace(policy, settle_s=0, min_free_bytes=0)
    done = [NOW_S - age for age in sorted(ages, reverse=True)]
    checkpoints = [Checkpoint(1, step, (b"a",), at) for step, at in enumerate(done)]
    gone = going(decide(checkpoints, NOW_S, None, policy))
    planned = Planned(policy.last, policy.every, policy.keep_for_s or NOW_S)
    kept = must_keep([Kept(each.step, each.changed_s, 1) for each in checkpoints], NOW_S, planned)
    assert {each.step for each in checkpoints} - {each.step for each in gone} == kept


def test_a_run_that_was_begun_again_keeps_its_fresh_ones() -> None:
    stale = [Checkpoint(1, step, (b"a",), NOW_S - 9000) for step in range(1000, 2000, 100)]
    fresh = [Checkpoint(1, step, (b"a",), NOW_S - 1000 + step) for step in range(500, 900, 100)]
    gone = {each.step for each in going(decide([*stale, *fresh], NOW_S, None, Retention(last=2, settle_s=0)))}
    assert gone == {each.step for each in stale[:-2]} | {500, 600}
