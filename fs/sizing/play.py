"""Playing days: failures, saves, restarts, clean-ups, publishes, copies and outages, one event after the other.

The same plan, days and seed give the same play. Each site's failures and each link's outages come from a stream of
their own, so that one site more does not change the luck of the others.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from functools import partial
from random import Random

from apollofs.fs.sizing.assumptions import DAY_S
from apollofs.fs.sizing.channel import Channel, Transfer
from apollofs.fs.sizing.crossing import DATASETS, METADATA, copy_targets, receivers
from apollofs.fs.sizing.played import Activity, Played, PlayedSite
from apollofs.fs.sizing.results import Plan
from apollofs.fs.sizing.retaining import Kept
from apollofs.fs.sizing.site_run import SiteRun
from apollofs.fs.user_error import UserError

DAYS_MAX = 3650.0
EVENTS_MAX = 2_000_000
FOR_EVER_S = 1e15
Watch = Callable[[float, SiteRun], None]


def play(plan: Plan, days: float, seed: int = 0, watch: Watch | None = None) -> Played:
    """Play so many days from an empty store. `watch` sees each site after each of its events, with the time in seconds.

    Raises UserError where that would be too many events to wait for.
    """
    if not 0 < days <= DAYS_MAX:
        raise UserError(f"{days:g} days can't be played: more than 0, at most {DAYS_MAX:.0f}")
    expected = _events_expected(plan, days)
    if expected > EVENTS_MAX:
        raise UserError(
            f"{days:g} days are {expected:,.0f} events, and at most {EVENTS_MAX:,} are played: ask for fewer days"
        )
    return _Play(plan, days * DAY_S, seed, watch).run(days)


def _events_expected(plan: Plan, days: float) -> float:
    work, retention = plan.given.workload, plan.given.retention
    a_day = len(plan.sites) * DAY_S * (2 / work.save_interval_s + 1 / retention.gc_interval_s)
    a_day += 24 * work.publishes_an_hour * (2 + 2 * len(plan.sites))
    a_day += sum(2 * site.shape.failures_a_day for site in plan.sites)
    a_day += 4 * len(plan.links) * plan.given.hardware.link_outages_a_day
    return days * a_day


class _Play:
    """The events that are due, and who they belong to."""

    def __init__(self, plan: Plan, end_s: float, seed: int, watch: Watch | None) -> None:
        self._plan, self._given = plan, plan.given
        self._end_s, self._seed, self._watch = end_s, seed, watch
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._publishes = 0
        shapes = [site.shape for site in plan.sites]
        self._receivers = [shape.name for shape in receivers(shapes, plan.given)]
        self._targets = {shape.name: copy_targets(shape, shapes, plan.given) for shape in shapes}
        self._sites = {site.shape.name: SiteRun(site, plan.given) for site in plan.sites}
        self._channels = {(one.source, one.target): one for one in _channels(plan)}

    def run(self, days: float) -> Played:
        """Everything, to the end."""
        for site in self._sites.values():
            site.begin()
            self._at(self._given.retention.gc_interval_s, partial(self._clean, site))
            self._start_training(site)
        if self._given.workload.publishes_an_hour and self._sites[self._plan.lead].shape.weights_bytes:
            self._at(3600 / self._given.workload.publishes_an_hour, self._publish)
        for link in self._plan.links:
            self._start_outages(link.link.first, link.link.second)
        while self._due and self._due[0][0] <= self._end_s:
            now_s, _, event = heapq.heappop(self._due)
            event(now_s)
        for channel in self._channels.values():
            channel.advance(self._end_s)
        sites = tuple(self._result(site) for site in self._sites.values())
        return Played(self._plan, days, self._seed, self._publishes, sites)

    def _result(self, site: SiteRun) -> PlayedSite:
        joined = [channel for ends, channel in self._channels.items() if site.name in ends]
        moved = [Activity(*stretch, channel.rate_bytes_s) for channel in joined for stretch in channel.moving]
        backlog = max((channel.backlog_peak for channel in joined if channel.target == site.name), default=0.0)
        return site.result(self._end_s, moved, backlog)

    def _at(self, time_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (time_s, next(self._order), event))

    def _seen(self, now_s: float, site: SiteRun) -> None:
        if self._watch is not None:
            self._watch(now_s, site)

    # -- training

    def _start_training(self, site: SiteRun) -> None:
        if not site.shape.training_gpus:
            return
        luck = Random(f"{self._seed}/failures/{site.name}")
        self._at(self._given.workload.save_interval_s, lambda now: self._save(site, now, site.life))
        if site.shape.failures_a_day:
            self._at(_gap_s(luck, site.shape.failure_interval_s), lambda now: self._fail(site, luck, now))

    def _save(self, site: SiteRun, now_s: float, life: int) -> None:
        if life != site.life:
            return
        site.save_begins(now_s)
        self._at(now_s + self._given.workload.save_stall_s, lambda now: self._saved(site, now, life))
        self._at(now_s + self._given.workload.save_interval_s, lambda now: self._save(site, now, life))

    def _saved(self, site: SiteRun, now_s: float, life: int) -> None:
        if life != site.life:
            return
        item = site.save_ends(now_s)
        if self._given.retention.keep_every and item.number % self._given.retention.keep_every == 0:
            for target in self._targets[site.name]:
                self._send(self._channels[site.name, target], item, now_s, urgent=False)
        self._seen(now_s, site)

    def _fail(self, site: SiteRun, luck: Random, now_s: float) -> None:
        life = site.fails(now_s)
        work = self._given.workload
        self._at(now_s + work.restart_s + work.restore_s, lambda now: self._restored(site, now, life))
        self._at(now_s + _gap_s(luck, site.shape.failure_interval_s), lambda now: self._fail(site, luck, now))
        self._seen(now_s, site)

    def _restored(self, site: SiteRun, now_s: float, life: int) -> None:
        if life != site.life:
            return
        site.restored(now_s)
        self._at(now_s + self._given.workload.save_interval_s, lambda now: self._save(site, now, life))

    # -- clean-up and publishing

    def _clean(self, site: SiteRun, now_s: float) -> None:
        site.clean(now_s)
        self._at(now_s + self._given.retention.gc_interval_s, partial(self._clean, site))
        self._seen(now_s, site)

    def _publish(self, now_s: float) -> None:
        """Weights are written as fast as a checkpoint is. While training is down there is nothing new."""
        lead = self._sites[self._plan.lead]
        self._at(now_s + 3600 / self._given.workload.publishes_an_hour, self._publish)
        if lead.is_down:
            return
        save = lead.plan.throughput.save or lead.plan.throughput.available
        self._at(now_s + lead.shape.weights_bytes / save, lambda now: self._published(lead, now_s, now))

    def _published(self, lead: SiteRun, asked_s: float, now_s: float) -> None:
        self._publishes += 1
        item = Kept(self._publishes, now_s, round(lead.shape.weights_bytes))
        self._arrived(lead, item, asked_s, now_s)
        for name in self._receivers:
            self._send(self._channels[lead.name, name], item, now_s, urgent=True)

    def _arrived(self, site: SiteRun, item: Kept, asked_s: float, now_s: float) -> None:
        again_s = site.publication(item, asked_s, now_s)
        if again_s is not None:
            self._at(again_s, site.load)
        self._seen(now_s, site)

    # -- links

    def _send(self, channel: Channel, item: Kept, now_s: float, *, urgent: bool) -> None:
        self._cross(channel, now_s)
        channel.submit(item, now_s, urgent=urgent)
        self._expect(channel)

    def _expect(self, channel: Channel) -> None:
        version = channel.version
        end_s = channel.next_end_s()
        if end_s <= self._end_s:
            self._at(end_s, lambda now: self._end(channel, version, now))

    def _end(self, channel: Channel, version: int, now_s: float) -> None:
        if version == channel.version:
            self._cross(channel, now_s)
            self._expect(channel)

    def _cross(self, channel: Channel, now_s: float) -> None:
        for transfer in channel.advance(now_s):
            self._received(self._sites[channel.target], channel, transfer, now_s)

    def _received(self, site: SiteRun, channel: Channel, transfer: Transfer, now_s: float) -> None:
        if transfer.urgent:
            self._arrived(site, transfer.item, transfer.asked_s, now_s)
        else:
            site.copy(channel.source, transfer.item, transfer.asked_s, now_s)
            self._seen(now_s, site)

    def _start_outages(self, first: str, second: str) -> None:
        hardware = self._given.hardware
        if not hardware.link_outages_a_day:
            return
        luck = Random(f"{self._seed}/outages/{first}/{second}")
        both = [channel for ends, channel in self._channels.items() if set(ends) == {first, second}]
        gap_s = DAY_S / hardware.link_outages_a_day

        def down(now_s: float) -> None:
            switch(now_s, up=False)
            self._at(now_s + hardware.link_outage_s, back)

        def back(now_s: float) -> None:
            switch(now_s, up=True)
            self._at(now_s + _gap_s(luck, gap_s), down)

        def switch(now_s: float, *, up: bool) -> None:
            for channel in both:
                self._cross(channel, now_s)
                channel.switch(up=up)
                self._expect(channel)

        self._at(_gap_s(luck, gap_s), down)


def _gap_s(luck: Random, mean_s: float) -> float:
    """Time to the next of what happens at random; for ever where the mean is."""
    return luck.expovariate(1.0) * min(mean_s, FOR_EVER_S)


def _channels(plan: Plan) -> list[Channel]:
    """Both directions of each link, at the rate that is left beside datasets and metadata."""
    found = []
    for one in plan.links:
        rate = (one.link.rate_bytes_s or one.peak) * plan.given.services.link_efficiency
        for source, target in ((one.link.first, one.link.second), (one.link.second, one.link.first)):
            steady = sum(f.average for f in one.flows if f.source == source and f.what in (DATASETS, METADATA))
            found.append(Channel(source, target, max(1.0, rate - steady)))
    return found
