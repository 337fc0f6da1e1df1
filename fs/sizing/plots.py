"""Pictures of a play: space, throughput and lag over time, as PNG files. The only place that knows matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apollofs.fs.sizing.assumptions import DAY_S
from apollofs.fs.sizing.ledger import KINDS
from apollofs.fs.sizing.played import Played, PlayedSite, rates
from apollofs.fs.sizing.results import SitePlan
from apollofs.fs.user_error import UserError

BINS = 300
PB, TB = 1e15, 1e12
NAMES = {"waiting": "waits for the clean-up", "saves": "checkpoints", "copies": "copies of checkpoints"}


def draw(played: Played, directory: Path) -> list[Path]:
    """Write space.png, throughput.png and lag.png into a directory, which is made; their paths.

    Raises UserError where matplotlib is not installed, OSError where the directory can't be written.
    """
    figure_class = _figure_class()
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, PlayedSite, SitePlan, float], None]] = {
        "space": _space,
        "throughput": _throughput,
        "lag": _lag,
    }
    written = []
    for name, painter in pictures.items():
        # a figure of its own, without pyplot: nothing global, no window, Agg draws it
        figure = figure_class(figsize=(10, 3.2 * len(played.sites) + 0.6), layout="constrained")
        axes: Sequence[Any] = figure.subplots(len(played.sites), 1, squeeze=False)[:, 0]
        for axis, site in zip(axes, played.sites, strict=True):
            painter(axis, site, played.plan.site(site.name), played.days)
            axis.set_title(f"{site.name}: {name}", loc="left")
            axis.set_xlim(0, played.days)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
        axes[-1].set_xlabel("days")
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1], format="png", dpi=110)
    return written


def _figure_class() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise UserError("plots need matplotlib: pip install 'apollofs[plan]'") from exc

    def make(**options: Any) -> Figure:
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        return figure

    return make


def _space(axis: Any, site: PlayedSite, plan: SitePlan, days: float) -> None:
    """What lies there, by kind, below what the plan says must be there."""
    times = [time_s / DAY_S for time_s, _ in site.samples]
    kinds = [kind for kind in KINDS if any(present[kind] for _, present in site.samples)]
    heights = [[present[kind] / PB for _, present in site.samples] for kind in kinds]
    axis.stackplot(times, heights, labels=[NAMES.get(kind, kind) for kind in kinds])
    axis.axhline(plan.space.paper / PB, color="black", linestyle=":", label="on paper")
    axis.axhline(plan.space.usable / PB, color="black", linestyle="--", label="in practice")
    axis.set_ylabel("PB")
    axis.set_ylim(bottom=0)


def _throughput(axis: Any, site: PlayedSite, plan: SitePlan, days: float) -> None:
    """Mean and peak of each stretch of time, below what is bought."""
    means, peaks = rates(site.activities, days * DAY_S, BINS)
    times = [(place + 0.5) * days / BINS for place in range(BINS)]
    axis.fill_between(times, [rate / TB for rate in peaks], label="peak", alpha=0.4)
    axis.plot(times, [rate / TB for rate in means], label="mean")
    axis.axhline(plan.throughput.available / TB, color="black", linestyle="--", label="bought")
    axis.set_ylabel("TB/s")
    axis.set_ylim(bottom=0)


def _lag(axis: Any, site: PlayedSite, plan: SitePlan, days: float) -> None:
    """How long after it was asked for something was here: seconds or, behind an outage, hours."""
    for name, lags in (("published weights", site.publish_lags), ("copies of checkpoints", site.copy_lags)):
        if lags:
            times = [(lag.asked_s + lag.lag_s) / DAY_S for lag in lags]
            axis.plot(times, [lag.lag_s for lag in lags], ".", markersize=3, label=name)
    axis.set_ylabel("seconds")
    axis.set_yscale("log")
