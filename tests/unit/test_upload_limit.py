"""How many uploads at once a mount finds worth while, beside stores that are made up, on a clock that is."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest
import trio

from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.upload_limit import LEAST, START, Climber, UploadLimit

BLOCK = 8 << 20
MB = 10**6


def play(climber: Climber, took_s: Callable[[int], float], uploads: int, begin_s: float = 0.0) -> float:
    """Uploads one after the other, as many at once as may be, each of which takes `took_s(how many are under way)`;
    the time at the end."""
    now, under_way = begin_s, list[float]()
    for _ in range(uploads):
        while len(under_way) < climber.limit:
            heapq.heappush(under_way, now + took_s(len(under_way) + 1))
        now = heapq.heappop(under_way)
        climber.ended(now, BLOCK, contended=True)
    return now


def store(connection: float, in_all: float) -> Callable[[int], float]:
    """A store that gives each connection so many bytes a second, and no more than that in all."""
    return lambda at_once: BLOCK / min(connection, in_all / at_once)


def test_it_climbs_while_each_connection_adds() -> None:
    climber = Climber(32)
    play(climber, store(connection=40 * MB, in_all=10_000 * MB), 5000)
    assert climber.limit >= 30


@pytest.mark.parametrize("knee", [2, 4, 12])
def test_it_comes_to_rest_near_what_the_store_can_take(knee: int) -> None:
    climber = Climber(32)
    now = play(climber, store(connection=100 * MB, in_all=100 * MB * knee), 20_000)
    seen = []
    for _ in range(50):
        now = play(climber, store(connection=100 * MB, in_all=100 * MB * knee), 100, now)
        seen.append(climber.limit)
    assert knee <= sorted(seen)[len(seen) // 2] <= knee + max(2, knee // 2)


def test_it_stays_within_its_bounds() -> None:
    for at_most in (1, 2, 5):
        climber = Climber(at_most)
        for _ in range(100):
            play(climber, store(connection=MB, in_all=1e12), 40)
            assert 1 <= climber.limit <= at_most


def test_failures_halve_it_and_it_comes_back() -> None:
    climber = Climber(16)
    now = play(climber, store(connection=50 * MB, in_all=1e12), 3000)
    assert climber.limit >= 12, "one that tries fewer now and then"
    while climber.limit > 1:
        before = climber.limit
        climber.failed(now)
        assert climber.limit == before // 2
    climber.failed(now)
    assert climber.limit == 1
    play(climber, store(connection=50 * MB, in_all=1e12), 3000, now)
    assert climber.limit >= 12


def test_a_store_that_becomes_slow_gets_fewer() -> None:
    climber = Climber(16)
    now = play(climber, store(connection=50 * MB, in_all=1e12), 3000)
    play(climber, store(connection=50 * MB, in_all=60 * MB), 3000, now)
    assert climber.limit <= 4


def test_small_losses_do_not_add_up() -> None:
    climber, rate, now = Climber(16), 100.0, 0.0
    for _ in range(5000):
        # a store that is a little slower with each upload less, by less than what is worth a trial
        now += BLOCK / (rate * MB * 0.98 ** (16 - climber.limit))
        climber.ended(now, BLOCK, contended=True)
    assert climber.limit >= LEAST


def test_who_has_little_to_upload_learns_nothing() -> None:
    climber = Climber(32)
    for second in range(1000):
        climber.ended(second, BLOCK, contended=False)
    assert climber.limit == START


async def test_places_are_given_as_the_number_says() -> None:
    limit, under_way, most = UploadLimit(3), 0, 0

    async def upload() -> None:
        nonlocal under_way, most
        async with limit.place(BLOCK):
            under_way += 1
            most = max(most, under_way)
            await trio.lowlevel.checkpoint()
            under_way -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(upload)
    assert most == limit.now == 3
    for _ in range(2):
        with pytest.raises(BodyUnavailable):
            async with limit.place(BLOCK):
                raise BodyUnavailable("the store is down")
    assert limit.now == 1
