"""What playing some days has shown, and the series that are drawn of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.fs.sizing.results import Plan


@dataclass(frozen=True, slots=True)
class Activity:
    """Bytes that moved evenly between two moments."""

    begin_s: float
    end_s: float
    rate_bytes_s: float


@dataclass(frozen=True, slots=True)
class Lag:
    """Something that was asked to be at a site: when, and how much later it was there."""

    asked_s: float
    lag_s: float


@dataclass(frozen=True, slots=True)
class PlayedSite:
    """One site. `samples`: (time, bytes by kind) at the beginning, just before each clean-up, and at the end."""

    name: str
    samples: tuple[tuple[float, dict[str, int]], ...]
    activities: tuple[Activity, ...]
    publish_lags: tuple[Lag, ...]
    copy_lags: tuple[Lag, ...]
    written: int
    removed: int
    present: int
    peak: int
    saves: int
    cut_short: int
    failures: int
    goodput: float
    backlog_peak: float

    def present_at(self, time_s: float) -> int:
        """All bytes that were there at the last sample up to this time."""
        place = bisect_right(self.samples, time_s, key=lambda sample: sample[0])
        return sum(self.samples[max(0, place - 1)][1].values())


@dataclass(frozen=True, slots=True)
class Played:
    """All sites, and what was played."""

    plan: Plan
    days: float
    seed: int
    publishes: int
    sites: tuple[PlayedSite, ...]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def rates(activities: Sequence[Activity], end_s: float, bins: int) -> tuple[list[float], list[float]]:
    """Mean and highest bytes a second in each of `bins` equal parts of the time."""
    width = end_s / bins
    means, peaks = [0.0] * bins, [0.0] * bins
    edges: list[tuple[float, float]] = []
    for one in activities:
        edges += [(one.begin_s, one.rate_bytes_s), (min(one.end_s, end_s), -one.rate_bytes_s)]
    # at one moment, what ends comes before what begins
    edges.sort()
    now_s, rate = 0.0, 0.0
    for time_s, change in [*edges, (end_s, 0.0)]:
        _spread(now_s, min(time_s, end_s), max(0.0, rate), width, means, peaks)
        now_s, rate = time_s, rate + change
    return means, peaks


def _spread(begin_s: float, end_s: float, rate: float, width: float, means: list[float], peaks: list[float]) -> None:
    """Count a stretch of one rate in the bins that it touches."""
    for place in range(min(len(means) - 1, int(begin_s / width)), len(means)):
        # the last bin has no end, so that the rounding of its edge loses nothing
        until_s = (place + 1) * width if place < len(means) - 1 else end_s
        inside_s = min(end_s, until_s) - begin_s
        if inside_s > 0:
            means[place] += rate * inside_s / width
            peaks[place] = max(peaks[place], rate)
            begin_s += inside_s
        if begin_s >= end_s:
            break
