"""Played days: nothing that must stay is gone, no byte is lost or made, and the same seed plays the same."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollofs.fs.sizing import Assumptions, Fleet, Plan, Site, make_plan, play
from apollofs.fs.sizing.channel import Channel
from apollofs.fs.sizing.fleet import parse_link
from apollofs.fs.sizing.ledger import Ledger
from apollofs.fs.sizing.played import Activity, percentile, rates
from apollofs.fs.sizing.retaining import Kept, Policy, Shelf, must_keep
from apollofs.fs.sizing.site_run import SiteRun
from apollofs.fs.user_error import UserError

HOUR_S = 3600.0


def small(**values: float | str) -> Plan:
    """Two sites whose steady state is reached within a day."""
    quick: dict[str, float | str] = {
        "keep_for": "6h",
        "publish_kept": "4h",
        "failures_a_day": 6,
        "link_outages_a_day": 3,
    }
    return make_plan(Fleet((Site("a", 512), Site("b", 256, 0.5))), Assumptions().changed(quick | values))


# -- retention


@given(
    gaps=st.lists(st.floats(1, 20), max_size=60),
    last=st.integers(1, 6),
    every=st.integers(0, 5),
    keep_for=st.floats(0, 100),
)
def test_a_shelf_keeps_what_must_stay_and_nothing_else(
    gaps: list[float], last: int, every: int, keep_for: float
) -> None:
    policy = Policy(last, every, keep_for)
    shelf, items, now = Shelf(policy), list[Kept](), 0.0
    for number, gap in enumerate(gaps, 1):
        now += gap
        items.append(Kept(number, now, 1))
        shelf.add(items[-1])
        shelf.retire(now)
        assert {item.number for item in shelf} == must_keep(items, now, policy)


@given(
    count=st.integers(1, 80),
    last=st.integers(1, 12),
    every=st.integers(0, 5),
    keep_for=st.integers(0, 60),
    phase=st.integers(0, 3),
)
def test_no_more_stays_than_a_plan_counts_with(count: int, last: int, every: int, keep_for: int, phase: int) -> None:
    policy = Policy(last, every, keep_for)
    items = [Kept(number, float(number), 1) for number in range(1, count + 1)]
    assert len(must_keep(items, count + phase / 4, policy)) <= policy.most(1.0)


# -- the whole play


@given(
    seed=st.integers(0, 1000),
    last=st.integers(1, 12),
    every=st.integers(0, 6),
    keep_for=st.integers(0, 24),
    grace=st.integers(0, 7200),
    outages=st.floats(0, 20),
)
@settings(deadline=None, max_examples=15)
def test_nothing_that_must_stay_is_gone_and_no_byte_is_lost(
    seed: int, last: int, every: int, keep_for: int, grace: int, outages: float
) -> None:
    plan = small(
        keep_last=last, keep_every=every, keep_for_s=keep_for * HOUR_S, gc_grace_s=grace, link_outages_a_day=outages
    )
    policy = Policy(last, every, keep_for * HOUR_S)

    def watch(now_s: float, site: SiteRun) -> None:
        ledger = site.ledger
        assert ledger.written == ledger.removed + ledger.total()
        assert min(ledger.present.values()) >= 0
        must = must_keep(site.completed, now_s, policy)
        assert must <= {item.number for item in site.saves}
        assert ledger.present["saves"] >= len(must) * round(site.shape.state_bytes)

    played = play(plan, 1.0, seed, watch)
    for site in played.sites:
        assert site.written == site.removed + site.present
        assert site.present <= site.peak
        assert 0 <= site.goodput <= 1


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_what_lies_there_stays_below_what_was_planned(seed: int) -> None:
    plan = small(link_outages_a_day=0)
    for site in play(plan, 1.5, seed).sites:
        space, throughput = plan.site(site.name).space, plan.site(site.name).throughput
        assert site.peak <= space.usable
        assert site.peak >= 0.9 * space.paper
        for _, present in site.samples:
            there = present["saves"] + present["copies"] + present["published"] + present["waiting"]
            planned = space.saves + space.copies + space.published + space.waiting + site.cut_short * space.saves
            # what waits for a clean-up is planned as a mean: failures that come in a cluster make some per cent more
            assert there <= 1.1 * planned
        assert max(rates(site.activities, 1.5 * 24 * HOUR_S, 100)[1]) <= throughput.available


def test_the_same_seed_plays_the_same_and_another_does_not() -> None:
    plan = small()
    assert play(plan, 2, 7) == play(plan, 2, 7)
    assert play(plan, 2, 7) != play(plan, 2, 8)


def test_one_site_more_does_not_change_the_luck_of_the_others() -> None:
    values = Assumptions().changed({"failures_a_day": 5})
    alone, beside = (
        play(make_plan(Fleet(sites), values), 3, 1).sites[0]
        for sites in ((Site("a", 512),), (Site("a", 512), Site("b", 256)))
    )
    assert (alone.failures, alone.saves, alone.cut_short, alone.goodput) == (
        beside.failures,
        beside.saves,
        beside.cut_short,
        beside.goodput,
    )


def test_without_failures_every_checkpoint_is_made() -> None:
    plan = make_plan(Fleet((Site("here", 64),)), Assumptions().changed({"failures_per_gpu_day": 0}))
    (site,) = play(plan, 1, 0).sites
    # the first begins after one interval, and the last ends with the day's last second or after it
    assert (site.failures, site.cut_short, site.saves) == (0, 0, 95)
    assert site.goodput == pytest.approx(1 - 15 / 900, abs=1e-3)


def test_goodput_is_about_what_was_planned() -> None:
    plan = make_plan(Fleet((Site("here", 8192),)))
    assert play(plan, 60, 3).sites[0].goodput == pytest.approx(plan.sites[0].rhythm.goodput, abs=0.02)


def test_a_slow_link_shows_as_lag_and_backlog() -> None:
    sites = (Site("a", 512), Site("b", 256, 0.5))
    fast, slow = (
        play(make_plan(Fleet(sites, (parse_link(f"a,b={rate}"),))), 1, 0).sites[1] for rate in ("100GB/s", "1GB/s")
    )
    assert max(lag.lag_s for lag in fast.publish_lags) < max(lag.lag_s for lag in slow.publish_lags)
    assert fast.backlog_peak < slow.backlog_peak


def test_fewer_events_must_be_asked_for() -> None:
    plan = make_plan(Fleet((Site("here", 64),)))
    for days, words in ((0, "can't be played"), (math.nan, "can't be played"), (10_000, "can't be played")):
        with pytest.raises(UserError, match=words):
            play(plan, days)
    busy = make_plan(Fleet((Site("here", 64),)), Assumptions().changed({"save_interval": "2s", "save_stall": "1s"}))
    with pytest.raises(UserError, match="ask for fewer days"):
        play(busy, 1000)


# -- parts


def test_weights_overtake_other_copies_on_a_link() -> None:
    channel = Channel("a", "b", rate_bytes_s=10.0)
    channel.submit(Kept(1, 0.0, 100), 0.0, urgent=False)
    assert channel.next_end_s() == 10.0
    assert channel.advance(5.0) == []
    channel.submit(Kept(2, 5.0, 20), 5.0, urgent=True)
    assert channel.next_end_s() == 7.0
    assert [transfer.item.number for transfer in channel.advance(7.0)] == [2]
    channel.switch(up=False)
    assert channel.next_end_s() == math.inf
    assert channel.advance(100.0) == []
    channel.switch(up=True)
    assert channel.next_end_s() == 105.0
    assert [transfer.item.number for transfer in channel.advance(105.0)] == [1]
    assert channel.moving == [(0.0, 7.0), (100.0, 105.0)]
    assert channel.backlog() == 0


def test_a_ledger_keeps_what_waits_for_its_grace() -> None:
    ledger = Ledger()
    ledger.write("saves", 10)
    ledger.drop("saves", [Kept(1, 0.0, 10)], 100.0)
    ledger.write_in_vain(5, 150.0)
    ledger.collect(159.0, grace_s=60.0)
    assert (ledger.total(), ledger.removed) == (15, 0)
    ledger.collect(160.0, grace_s=60.0)
    assert (ledger.total(), ledger.removed, ledger.written, ledger.peak) == (5, 10, 15, 15)


@given(
    st.lists(st.tuples(st.floats(0, 90), st.floats(0.1, 30), st.floats(1, 100)), min_size=1, max_size=12),
    st.integers(1, 20),
)
def test_series_hold_every_byte(parts: list[tuple[float, float, float]], bins: int) -> None:
    activities = [Activity(begin, begin + length, rate) for begin, length, rate in parts]
    means, peaks = rates(activities, 100.0, bins)
    moved = sum(rate * (min(begin + length, 100.0) - begin) for begin, length, rate in parts)
    assert sum(means) * 100.0 / bins == pytest.approx(moved, rel=1e-6)
    assert all(mean <= peak * (1 + 1e-9) + 1e-6 for mean, peak in zip(means, peaks, strict=True))
    assert max(peaks) <= sum(rate for _, _, rate in parts) * (1 + 1e-9)


def test_what_was_there_at_a_time() -> None:
    (site,) = play(make_plan(Fleet((Site("here", 64),))), 1, 0).sites
    assert site.present_at(0.0) == site.samples[0][1]["datasets"] + site.samples[0][1]["scratch"]
    assert site.present_at(24 * HOUR_S) == site.present
    assert site.present_at(0.0) < site.present_at(12.5 * HOUR_S) == sum(site.samples[12][1].values())


def test_percentiles() -> None:
    assert percentile([], 0.5) == 0
    assert [percentile([3, 1, 2, 4], share) for share in (0, 0.5, 1)] == [1, 3, 4]
