"""Sizing: the reference cases come out, more GPUs never need less, and what can't be is refused with its reason."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollofs.fs.sizing import Assumptions, Fleet, Link, Plan, Site, make_plan
from apollofs.fs.sizing.fleet import parse_link, parse_site
from apollofs.fs.user_error import UserError

REFERENCE = Assumptions()


def plan_for(gpus: int, **values: float | str) -> Plan:
    return make_plan(Fleet((Site("here", gpus),)), REFERENCE.changed(values))


# -- the reference cases


def test_8192_gpus() -> None:
    plan = plan_for(8192)
    assert plan.gpu_racks == 120
    assert plan.available == pytest.approx(2.5e12, rel=0.02)
    assert plan.paper == pytest.approx(100e15, rel=0.01)
    assert plan.usable == pytest.approx(120e15, rel=0.025)
    assert plan.raw == pytest.approx(plan.usable * 11 / 8)
    assert plan.sites[0].per_rack == pytest.approx(2.5e12 / 120, rel=0.02)
    assert plan.shortfalls == ()


def test_4096_gpus() -> None:
    plan = plan_for(4096)
    # racks are bought in units of eight: 57 are needed
    assert plan.gpu_racks == 64
    assert plan.available == pytest.approx(1.25e12, rel=0.02)
    assert plan.paper == pytest.approx(50e15, rel=0.01)
    assert plan.usable == pytest.approx(60e15, rel=0.025)


def test_unequal_sites_share_training_and_inference() -> None:
    plan = make_plan(Fleet((Site("north", 4000, 0.5), Site("south", 8000))))
    north, south = plan.sites
    assert plan.lead == "south"
    assert (north.machines.gpu_racks, south.machines.gpu_racks) == (56, 112)
    assert plan.paper == north.space.paper + south.space.paper
    # north serves the weights of south, and each holds copies of the other's hourly checkpoints
    assert north.space.published == south.space.published > 0
    assert south.space.copies == pytest.approx(north.shape.state_bytes * 2161)
    assert north.space.copies == pytest.approx(south.shape.state_bytes * 2161)
    (link,) = plan.links
    assert {flow.what for flow in link.flows} == {
        "published weights",
        "copies of checkpoints",
        "shared datasets",
        "metadata",
    }
    assert plan.etcd.quorum_s == 0


# -- formulas, by hand


def test_a_checkpoint_and_what_it_takes() -> None:
    site = plan_for(800, params="100B", inference_share="0%", save_stall="10s", publishes_an_hour=0).sites[0]
    assert site.shape.state_bytes == 100e9 * 14
    assert site.throughput.save == 140e9
    assert site.node.save_bytes_s == pytest.approx(700e6)
    assert site.space.published == site.throughput.load == 0
    assert site.throughput.peak == pytest.approx(140e9 + site.throughput.dataset)


def test_failures_by_the_day_or_by_the_gpu() -> None:
    # Llama 3: 419 failures in 54 days of 16,384 GPUs
    assert plan_for(16_384, inference_share=0).sites[0].shape.failures_a_day == pytest.approx(419 / 54)
    site = plan_for(8192, failures_a_day=4, save_stall="30s").sites[0]
    assert site.shape.failure_interval_s == 21_600
    assert site.rhythm.best_interval_s == pytest.approx(math.sqrt(2 * 30 * 21_600))


def test_metadata_of_many_files_needs_more_volumes() -> None:
    one, many = plan_for(8192), plan_for(8192, dataset_file_bytes="100MB")
    assert one.etcd.volumes == 1
    assert many.etcd.files > 4e8
    assert many.etcd.volumes == math.ceil(many.etcd.database_bytes / (8e9 * 0.7))


def test_the_round_trip_of_a_commit() -> None:
    sites = (Site("a", 900), Site("b", 600), Site("c", 300))
    links = (Link("a", "b", 1e12, 0.040), Link("a", "c", 1e12, 0.010), Link("b", "c", 1e12))
    assert make_plan(Fleet(sites, links)).etcd.quorum_s == 0.010
    assert make_plan(Fleet(sites)).etcd.quorum_s is None


def test_a_link_that_is_too_slow_is_named() -> None:
    sites = (Site("north", 4000), Site("south", 8000))
    (slow,) = make_plan(Fleet(sites, (parse_link("north,south=100Gbit/s"),))).shortfalls
    assert "its backlog would grow for ever" in slow
    (late,) = make_plan(
        Fleet(sites, (parse_link("north,south=170Gbit/s"),)), REFERENCE.changed({"publish_copy": "60s"})
    ).shortfalls
    assert "published weights arrive after 2.77 min, not 1 min" in late
    assert make_plan(Fleet(sites, (parse_link("north,south=200Gbit/s,10ms"),))).shortfalls == ()


# -- properties

GPUS = st.integers(1, 200_000)
# a smaller share may not hold the weights, which is refused
SHARES = st.just(0.0) | st.floats(0.05, 1)


def figures(plan: Plan) -> dict[str, float]:
    """All that a larger fleet must not need less of."""
    site = plan.sites[0]
    found: dict[str, float] = {
        name: getattr(plan, name) for name in ("gpu_racks", "available", "paper", "usable", "raw")
    }
    found |= {name: getattr(site.machines, name) for name in ("servers", "storage_racks", "gateways")}
    found |= {name: getattr(plan.etcd, name) for name in ("files", "database_bytes", "volumes", "peak_requests_s")}
    return found


@given(first=GPUS, second=GPUS, share=SHARES)
@settings(deadline=None)
def test_more_gpus_never_need_less(first: int, second: int, share: float) -> None:
    few, many = sorted((first, second))
    smaller, larger = (figures(plan_for(gpus, inference_share=share)) for gpus in (few, many))
    assert {name for name in smaller if larger[name] < smaller[name] * (1 - 1e-12)} == set()


@given(gpus=st.integers(8, 100_000), factor=st.floats(1, 10))
@settings(deadline=None)
def test_a_shorter_stall_needs_more_throughput_and_no_more_space(gpus: int, factor: float) -> None:
    slow, fast = (plan_for(gpus, save_stall_s=15 / by).sites[0] for by in (1, factor))
    assert fast.throughput.save == pytest.approx(slow.throughput.save * factor)
    assert fast.space.paper == slow.space.paper


@given(gpus=GPUS, share=SHARES, seed=st.integers(0, 5))
@settings(deadline=None)
def test_totals_and_order_of_sizes(gpus: int, share: float, seed: int) -> None:
    plan = make_plan(Fleet(tuple(Site(f"s{place}", gpus + place, share) for place in range(1 + seed))))
    for site in plan.sites:
        assert site.shape.training_gpus + site.shape.inference_gpus == site.shape.site.gpus
        assert site.space.paper <= site.space.usable <= site.space.raw
        assert (
            site.throughput.peak <= site.throughput.available <= site.throughput.reads + site.throughput.writes + 1e-3
        )
        drives = site.machines.servers * plan.given.hardware.server_drives * plan.given.hardware.drive_bytes
        assert site.space.raw <= drives * (1 + 1e-12)
    # what leaves one site arrives at another
    assert sum(site.throughput.leaving for site in plan.sites) == pytest.approx(
        sum(site.throughput.arriving for site in plan.sites)
    )


# -- what can't be


@pytest.mark.parametrize(
    ("gpus", "values", "words"),
    [
        (8, {"params": "2T"}, "can't be in the"),
        (48, {"params": "405B", "inference_share": "5%"}, "weights of 810 GB need 9 inference GPUs"),
        (8192, {"save_stall": "15m"}, "nothing would be trained"),
        (8192, {"failures_a_day": 500}, "needs 11 min to start again"),
        (8192, {"save_stall": "0.5s"}, "save_stall_s must be at least"),
        (8192, {"publish_load": "10s"}, "publish_load_s must be at least"),
        (8192, {"node_disk_bytes": "100GB"}, "local disk"),
        (8192, {"keep_last": 0}, "keep_last is 0"),
        (8192, {"keep_last": 2.5}, "no whole number"),
        (8192, {"fill_limit": "120%"}, "fill_limit is 120 %: 10 % to 100 % is possible"),
        (8192, {"save_intervall": "1m"}, "save_interval_s?"),
        (8192, {"save_interval": "1 week"}, "is no time"),
        (8192, {"save_interval": math.nan}, "is no time"),
        (0, {}, "has 0 GPUs"),
        (10**9, {}, "GPUs"),
    ],
)
def test_what_is_impossible_says_why(gpus: int, values: dict[str, float | str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        plan_for(gpus, **values)


@pytest.mark.parametrize(
    ("sites", "links", "words"),
    [
        ((), (), "no GPU to plan for"),
        (("a=8", "a=9"), (), "given twice"),
        (("a=8", "b=8"), ("a,c=1GB/s",), "must join two of the sites"),
        (("a=8", "b=8"), ("a,b=1GB/s", "b,a=1GB/s"), "given twice"),
        (("a=8", "b=8", "c=8"), ("a,b=1GB/s",), "no link joins them"),
        (("a",), (), "is no site"),
        (("a=8,inference=150%",), (), "0 to 1 is possible"),
        (("a=8.5",), (), "no whole number"),
        (("a b=8",), (), "is no name"),
        (("a=8", "b=8"), ("a,b",), "is no link"),
        (("a=8", "b=8"), ("a,b=0GB/s",), "carries nothing"),
    ],
)
def test_a_fleet_that_does_not_fit_together(sites: tuple[str, ...], links: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_plan(Fleet(tuple(map(parse_site, sites)), tuple(map(parse_link, links))))


def test_every_assumption_has_a_source_a_meaning_and_a_possible_value() -> None:
    names = [about.name for about in REFERENCE.listed()]
    assert len(set(names)) == len(names)
    for about in REFERENCE.listed():
        assert about.source
        assert about.meaning
        assert about.low <= about.value <= about.high
        assert REFERENCE.changed({about.name: about.value}) == REFERENCE


def test_what_is_changed_is_marked() -> None:
    changed = REFERENCE.changed({"save_interval": "30m", "drive_bytes": "30.72TB"})
    assert {about.name for about in changed.listed() if about.changed} == {"save_interval_s", "drive_bytes"}
    assert dataclasses.replace(changed.workload, save_interval_s=900.0) == REFERENCE.workload
