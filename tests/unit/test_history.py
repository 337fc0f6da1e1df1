"""The checker of histories: it accepts what may happen, and finds what may not."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest

from tests.support.history import TOKEN_BYTES, Kind, NotLinearizable, Operation, Undecided, check
from tests.support.history.records import decode, encode

SEEDS = range(40)
HOSTS = ("west", "east", "north")
NAMES = ("a", "b", "c")


class Story:
    """Writes a history down: `at` is when an operation begins, and it lasts one second unless said otherwise."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._numbers = itertools.count(1)

    def tell(
        self, at: float, who: str, kind: Kind, *names: str, lasts_s: float = 1.0, error: int = 0, unknown: bool = False
    ) -> Operation:
        """Of `who`, a process of the host before the dot."""
        number = next(self._numbers)
        ino = number if kind in (Kind.CREATE, Kind.REPLACE) and not error and not unknown else 0
        host = who.split(".")[0]
        self.operations.append(
            Operation(who, host, kind, names, number, at, at + lasts_s, error=error, unknown=unknown, ino=ino)
        )
        return self.operations[-1]

    def gone(self, at: float, who: str, name: str) -> None:
        self.tell(at, who, Kind.STAT, name, error=errno.ENOENT)

    def seen(self, at: float, who: str, name: str, made: Operation, tokens: int = 1) -> None:
        """stat: the file that `made` has made, with so many tokens."""
        found = self.tell(at, who, Kind.STAT, name)
        self.operations[-1] = replace(found, ino=made.ino, size=tokens * TOKEN_BYTES)

    def read(self, at: float, who: str, name: str, *written: Operation) -> None:
        """What these have written, in this order."""
        found = self.tell(at, who, Kind.READ, name)
        self.operations[-1] = replace(found, tokens=tuple(each.number for each in written))

    def append(self, at: float, who: str, name: str, made: Operation, lasts_s: float = 1.0) -> Operation:
        """To the file that `made` has made."""
        told = self.tell(at, who, Kind.APPEND, name, lasts_s=lasts_s)
        self.operations[-1] = replace(told, ino=made.ino)
        return self.operations[-1]

    def assert_good(self) -> None:
        check(self.operations)

    def assert_bad(self) -> None:
        with pytest.raises(NotLinearizable):
            check(self.operations)


@pytest.fixture
def story() -> Story:
    return Story()


def test_tokens_survive_and_damage_is_seen() -> None:
    assert decode(encode(1) + encode(20)) == (1, 20)
    assert decode(encode(1) + encode(20)[:-1]) == (1, -1)
    assert decode(bytes(TOKEN_BYTES)) == (-1,)


def test_what_is_done_in_turn(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    more = story.append(2, "east", "a", made)
    story.read(4, "north", "a", more)
    story.tell(6, "north", Kind.RENAME, "a", "b")
    story.gone(8, "west", "a")
    story.seen(8, "east", "b", made)
    story.tell(10, "west", Kind.UNLINK, "b")
    story.tell(12, "east", Kind.UNLINK, "b", error=errno.ENOENT)
    other = story.tell(14, "east", Kind.REPLACE, "b")
    story.tell(16, "north", Kind.CREATE, "b", error=errno.EEXIST)
    story.read(18, "west", "b", other)
    story.assert_good()


def test_while_it_runs_a_change_is_seen_or_not(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a", lasts_s=10)
    story.gone(1, "east", "a")
    story.seen(3, "north", "a", made)
    story.assert_good()


def test_but_not_first_seen_and_then_not(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a", lasts_s=10)
    story.seen(1, "north", "a", made)
    story.gone(3, "east", "a")
    story.assert_bad()


def test_a_stale_read(story: Story) -> None:
    old = story.tell(0, "west", Kind.REPLACE, "a")
    story.tell(2, "west", Kind.REPLACE, "a")
    story.read(4, "east", "a", old)
    story.assert_bad()


def test_a_stale_stat(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    story.append(2, "west", "a", made)
    story.seen(4, "east", "a", made, tokens=1)
    story.assert_bad()


def test_a_name_that_is_not_yet_seen(story: Story) -> None:
    story.tell(0, "west", Kind.CREATE, "a")
    story.gone(2, "east", "a")
    story.assert_bad()


def test_a_lost_update(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.append(2, "west", "a", made)
    second = story.append(2, "east", "a", made)
    story.read(4, "north", "a", second)
    story.assert_bad()


def test_an_update_that_happens_twice(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    once = story.append(2, "west", "a", made)
    story.read(4, "east", "a", made, once, once)
    story.assert_bad()


def test_appends_in_two_orders(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    one, two = story.append(2, "west", "a", made), story.append(2, "east", "a", made)
    story.read(4, "north", "a", made, two, one)
    story.assert_good()
    story.read(6, "west", "a", made, one, two)
    story.assert_bad()


def test_resurrection_after_unlink(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "east", Kind.UNLINK, "a")
    story.gone(4, "west", "a")
    story.seen(6, "north", "a", made, tokens=0)
    story.assert_bad()


def test_half_of_a_replace(story: Story) -> None:
    story.tell(0, "west", Kind.REPLACE, "a")
    other = story.tell(2, "west", Kind.REPLACE, "a", lasts_s=5)
    half = story.tell(3, "east", Kind.READ, "a")
    story.operations[-1] = replace(half, tokens=decode(encode(other.number)[:8]))
    story.assert_bad()


def test_both_names_during_a_rename(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west", Kind.RENAME, "a", "b", lasts_s=10)
    story.seen(3, "east", "b", made, tokens=0)
    story.seen(5, "east", "a", made, tokens=0)
    story.assert_bad()


def test_two_winners_of_an_exclusive_create(story: Story) -> None:
    story.tell(0, "west", Kind.CREATE, "a")
    story.tell(0, "east", Kind.CREATE, "a")
    story.assert_bad()


def test_a_file_that_moves_while_it_is_opened(story: Story) -> None:
    """The name meant it, and what is read came to it under another name."""
    made = story.tell(0, "west", Kind.REPLACE, "a")
    story.tell(3, "west", Kind.RENAME, "a", "b")
    more = story.append(5, "west", "b", made)
    found = story.tell(2, "east", Kind.READ, "a", lasts_s=10)
    story.operations[-1] = replace(found, tokens=(made.number, more.number))
    story.assert_good()


@pytest.mark.parametrize("seen", [True, False])
def test_an_unknown_outcome_may_have_happened_or_not(story: Story, *, seen: bool) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west", Kind.UNLINK, "a", unknown=True)
    if seen:
        story.seen(4, "west", "a", made, tokens=0)
    story.gone(6, "east", "a")
    story.assert_good()


def test_but_not_come_and_go(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west", Kind.UNLINK, "a", unknown=True)
    story.gone(4, "east", "a")
    story.seen(6, "east", "a", made, tokens=0)
    story.assert_bad()


def test_an_append_is_seen_on_its_host_before_it_is_committed(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    more = story.append(2, "west.1", "a", made, lasts_s=10)
    story.read(3, "west.2", "a", made, more)
    story.read(5, "east", "a", made)
    story.assert_good()
    story.read(13, "east", "a", made)
    story.assert_bad()


def test_an_append_is_not_seen_elsewhere_and_then_not(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    more = story.append(2, "west.1", "a", made, lasts_s=10)
    story.read(3, "north", "a", made, more)
    story.read(5, "east", "a", made)
    story.assert_bad()


def test_an_append_to_what_has_no_name_any_more_is_this_hosts_own(story: Story) -> None:
    made = story.tell(0, "west", Kind.REPLACE, "a")
    story.tell(3, "east", Kind.UNLINK, "a")
    more = story.append(2, "west.1", "a", made, lasts_s=4)
    found = [story.tell(1.5, who, Kind.READ, "a", lasts_s=9) for who in ("west.2", "east.2")]
    story.operations[-2] = replace(found[0], tokens=(made.number, more.number))
    story.operations[-1] = replace(found[1], tokens=(made.number,))
    story.assert_good()


# -- the one limit: what was before a call of the same host, until it returns ------------------------------------------


def in_flight(story: Story, looker: str, at: float) -> None:
    """`looker` still sees at `at` what an unlink of west, from 2 to 10, has taken away, as another mount has seen."""
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west.1", Kind.UNLINK, "a", lasts_s=8)
    story.gone(3, "east.1", "a")
    story.seen(at, looker, "a", made, tokens=0)


def test_a_host_may_see_what_was_before_its_call(story: Story) -> None:
    in_flight(story, "west.2", 5)
    story.gone(7, "west.2", "a")
    story.assert_good()


def test_another_host_may_not(story: Story) -> None:
    in_flight(story, "east.2", 5)
    story.assert_bad()


def test_nor_the_host_after_the_return(story: Story) -> None:
    in_flight(story, "west.2", 11)
    story.assert_bad()


def test_nor_what_was_before_a_change_of_another_mount(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west.1", Kind.UNLINK, "a", lasts_s=8)
    story.gone(3, "east", "a")
    story.tell(5, "east", Kind.CREATE, "a")
    story.seen(7, "west.2", "a", made, tokens=0)
    story.assert_bad()


@pytest.mark.parametrize("at", [3, 11])
def test_two_may_rename_one_file_in_the_same_way_at_the_same_time(story: Story, at: float) -> None:
    """The one that comes late has found it under both names, and does nothing. Later there is nothing to rename."""
    story.tell(0, "west", Kind.CREATE, "a")
    story.tell(2, "west", Kind.RENAME, "a", "b", lasts_s=8)
    story.tell(at, "east", Kind.RENAME, "a", "b", lasts_s=4)
    story.gone(20, "north", "a")
    if at < 10:
        story.assert_good()
    else:
        story.assert_bad()


def test_but_not_another_file(story: Story) -> None:
    for name in ("a", "c"):
        story.tell(0, f"west.{name}", Kind.CREATE, name)
    story.tell(2, "west", Kind.RENAME, "a", "b", lasts_s=8)
    story.tell(3, "east", Kind.RENAME, "a", "c", lasts_s=8)
    story.assert_bad()


# -- histories that were not thought out -------------------------------------------------------------------------------


def simulated(seed: int, *, stale: float = 0.0) -> list[Operation]:
    """Processes on three hosts that act on one namespace, each at a moment within its call. With `stale`, looks are
    answered that often from what the host saw before, whatever has happened since."""
    rng = random.Random(seed)
    free_at = {f"{host}.{number}": 0.0 for host in HOSTS for number in range(2)}
    names: dict[str, list[int]] = {}
    remembered: dict[tuple[str, str], list[int]] = {}
    story: list[Operation] = []
    for number, moment in zip(range(1, 121), itertools.count(1.0), strict=False):
        process = rng.choice([each for each, free in free_at.items() if free <= moment])
        begin = rng.uniform(max(free_at[process], moment - 3), moment)
        free_at[process] = end = rng.uniform(moment, moment + 3)
        told = Operation(process, process.split(".")[0], Kind.STAT, (rng.choice(NAMES),), number, begin, end)
        story.append(acted(told, rng, names, remembered if rng.random() < stale else {}))
        for name in NAMES:
            if rng.random() < 0.3:
                remembered[told.host, name] = list(names.get(name, []))
    return story


def acted(
    told: Operation, rng: random.Random, names: dict[str, list[int]], remembered: dict[tuple[str, str], list[int]]
) -> Operation:
    """The operation with a kind and a result; a file is its number and its tokens."""
    (name,) = told.names
    kind = rng.choice([*Kind, Kind.STAT, Kind.READ])
    file = names.get(name, [])
    if kind in (Kind.STAT, Kind.READ):
        file = remembered.get((told.host, name), file)
    if kind is Kind.REPLACE:
        names[name] = [told.number, told.number]
        return replace(told, kind=kind, ino=told.number)
    if kind is Kind.CREATE:
        if file:
            return replace(told, kind=kind, error=errno.EEXIST)
        names[name] = [told.number]
        return replace(told, kind=kind, ino=told.number)
    if not file:
        return replace(told, kind=kind, names=(name, NAMES[0])[: 2 if kind is Kind.RENAME else 1], error=errno.ENOENT)
    if kind is Kind.UNLINK:
        del names[name]
        return replace(told, kind=kind)
    if kind is Kind.RENAME:
        target = rng.choice([each for each in NAMES if each != name])
        names[target] = names.pop(name)
        return replace(told, kind=kind, names=(name, target))
    if kind is Kind.APPEND:
        names[name] = [*file, told.number]
        return replace(told, kind=kind, ino=file[0])
    return replace(told, kind=kind, ino=file[0], size=(len(file) - 1) * TOKEN_BYTES, tokens=tuple(file[1:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_simulated_history_is_accepted(seed: int) -> None:
    check(simulated(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_simulated_history_is_accepted_when_answers_were_lost(seed: int) -> None:
    check(with_lost_answers(simulated(seed), random.Random(seed)))


def with_lost_answers(story: Iterable[Operation], rng: random.Random) -> Iterator[Operation]:
    for operation in story:
        if operation.only_looks or rng.random() > 0.1:
            yield operation
        else:
            yield replace(operation, unknown=True, ino=operation.ino if operation.kind is Kind.APPEND else 0)


def test_a_simulated_stale_cache_is_found() -> None:
    """Each look that is answered from it falls into a history of its own, and nearly all of those are told apart."""
    found, wrong = 0, 0
    for seed in SEEDS:
        story = simulated(seed, stale=0.2)
        found += not is_linearizable(story)
        wrong += not is_linearizable(in_turn(story))
    assert wrong == len(SEEDS)
    assert found > 0.9 * len(SEEDS)


def in_turn(story: Sequence[Operation]) -> list[Operation]:
    """The same operations, none at the same time as another."""
    return [replace(each, invoked_s=2.0 * each.number, returned_s=2.0 * each.number + 1) for each in story]


def is_linearizable(story: Iterable[Operation]) -> bool:
    try:
        check(story)
    except NotLinearizable:
        return False
    return True


def test_a_search_that_takes_too_long_is_given_up(story: Story) -> None:
    made = story.tell(0, "west", Kind.CREATE, "a")
    for number in range(9):
        story.append(2, f"west.{number}", "a", made, lasts_s=50)
    story.seen(60, "east", "a", made, tokens=10)
    with pytest.raises(Undecided):
        check(story.operations, nodes_max=500)
