"""What a plan and a play say, as text for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import TypeVar

from apollofs.fs.sizing.assumptions import DAY_S, Assumptions
from apollofs.fs.sizing.played import Played, PlayedSite, percentile
from apollofs.fs.sizing.results import LinkPlan, Plan, SitePlan
from apollofs.fs.sizing.units import Unit, show, show_bits, show_count

T = TypeVar("T")
WIDTH = 110
STEPS = 6
"""How many steps of time a text shows."""

SITE_ROWS: tuple[tuple[str, Callable[[SitePlan], str]], ...] = (
    ("GPUs", lambda site: show_count(site.shape.site.gpus)),
    ("  that train, that serve", lambda site: f"{site.shape.training_gpus:,}, {site.shape.inference_gpus:,}"),
    ("racks of GPUs, nodes", lambda site: f"{site.machines.gpu_racks:,}, {site.shape.nodes:,}"),
    ("parameters", lambda site: show_count(site.shape.params)),
    ("a checkpoint", lambda site: show(site.shape.state_bytes, Unit.BYTES)),
    ("failures of training a day", lambda site: f"{site.shape.failures_a_day:.2f}"),
    ("best checkpoint interval", lambda site: _best(site.rhythm.best_interval_s)),
    ("time that training uses well", lambda site: _goodput(site.rhythm.goodput)),
    ("", lambda _: ""),
    ("throughput to buy", lambda site: show(site.throughput.available, Unit.BYTES_S)),
    ("  a rack of GPUs", lambda site: show(site.per_rack, Unit.BYTES_S)),
    ("  a node that saves, loads", lambda site: _two(site.node.save_bytes_s, site.node.load_bytes_s, Unit.BYTES_S)),
    ("  checkpoint, restart", lambda site: _two(site.throughput.save, site.throughput.restore, Unit.BYTES_S)),
    ("  datasets, weights", lambda site: _two(site.throughput.dataset, site.throughput.load, Unit.BYTES_S)),
    ("  from, to other sites", lambda site: _two(site.throughput.arriving, site.throughput.leaving, Unit.BYTES_S)),
    ("", lambda _: ""),
    ("space on paper", lambda site: show(site.space.paper, Unit.BYTES)),
    ("  datasets, scratch", lambda site: _two(site.space.datasets, site.space.scratch, Unit.BYTES)),
    ("  checkpoints, copies", lambda site: _two(site.space.saves, site.space.copies, Unit.BYTES)),
    ("  published weights", lambda site: show(site.space.published, Unit.BYTES)),
    ("space in practice", lambda site: show(site.space.usable, Unit.BYTES)),
    ("  waits for the clean-up", lambda site: show(site.space.waiting, Unit.BYTES)),
    ("drives, with parity", lambda site: show(site.space.raw, Unit.BYTES)),
    ("", lambda _: ""),
    ("storage servers, racks", lambda site: f"{site.machines.servers:,}, {site.machines.storage_racks:,}"),
    ("  which follow from", lambda site: site.machines.limit),
    ("S3 gateways", lambda site: show_count(site.machines.gateways)),
    ("S3 requests a second", lambda site: show_count(round(site.requests_s))),
    ("cores, disk of a node", lambda site: f"{site.node.cores:.1f}, {show(site.node.disk_bytes, Unit.BYTES)}"),
)
"""Label, and the cell of a site."""

PLAYED_ROWS: tuple[tuple[str, Callable[[PlayedSite], str]], ...] = (
    ("checkpoints, cut short", lambda site: f"{site.saves:,}, {site.cut_short:,}"),
    ("failures", lambda site: f"{site.failures:,}"),
    ("time that training used well", lambda site: _goodput(site.goodput)),
    ("written", lambda site: show(site.written, Unit.BYTES)),
    ("removed", lambda site: show(site.removed, Unit.BYTES)),
    ("there at the end", lambda site: show(site.present, Unit.BYTES)),
    ("most that was there", lambda site: show(site.peak, Unit.BYTES)),
    ("weights arrived, half after", lambda site: _late(site, 0.5)),
    ("  99 of 100 after", lambda site: _late(site, 0.99)),
    ("  the latest after", lambda site: _late(site, 1.0)),
    ("largest backlog of copies", lambda site: show(site.backlog_peak, Unit.BYTES)),
)


def plan_text(plan: Plan) -> str:
    """The plan: totals, a column for each site, etcd, links, and what can't be met."""
    lines = list(_totals(plan))
    lines += ["", *_columns([site.shape.name for site in plan.sites], SITE_ROWS, plan.sites)]
    lines += ["", *_etcd(plan)]
    for link in plan.links:
        lines += ["", *_link(link)]
    lines += ["", *_settings(plan)]
    lines += [f"CAN'T BE MET: {sentence}" for sentence in plan.shortfalls]
    return "\n".join(line.rstrip() for line in lines)


def played_text(played: Played) -> str:
    """What happened in the days that were played."""
    head = f"played {played.days:g} days with seed {played.seed}: {played.publishes:,} publishes"
    names = [site.name for site in played.sites]
    lines = [head, "", *_columns(names, PLAYED_ROWS, played.sites), "", *_over_time(played)]
    return "\n".join(line.rstrip() for line in lines)


def assumptions_text(given: Assumptions) -> str:
    """Every assumption: value, meaning, source. `*` marks an estimate, `!` what was changed."""
    lines = ["* an estimate, to be replaced by what you know    ! changed here"]
    group = ""
    for about in given.listed():
        if about.group != group:
            group = about.group
            lines += ["", f"[{group}]"]
        mark = "!" if about.changed else "*" if about.estimate else " "
        # a value that was changed has no source but the one who changed it
        source = "given" if about.changed else about.source
        lines.append(f"{mark} {about.name:<24} {about.text():>13}  {about.meaning}")
        lines += wrap(source, WIDTH, initial_indent=" " * 42, subsequent_indent=" " * 42)
    return "\n".join(lines)


def _totals(plan: Plan) -> Iterator[str]:
    places = "1 site" if len(plan.sites) == 1 else f"{len(plan.sites)} sites"
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus:,} GPUs"
    yield f"{gpus} at {places}: {plan.gpu_racks:,} racks of GPUs, {show(plan.available, Unit.BYTES_S)}"
    yield (
        f"space: {show(plan.paper, Unit.BYTES)} on paper, {show(plan.usable, Unit.BYTES)} in practice, "
        f"{show(plan.raw, Unit.BYTES)} of drives"
    )


def _columns(names: Sequence[str], rows: Sequence[tuple[str, Callable[[T], str]]], sites: Sequence[T]) -> Iterator[str]:
    """A line for each row; all columns as wide as the widest cell."""
    cells = [names, *([cell(site) for site in sites] for _, cell in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(names))]
    label_width = max(len(label) for label, _ in rows)
    for label, row in zip(["", *(label for label, _ in rows)], cells, strict=True):
        yield f"{label:<{label_width}}  " + "  ".join(
            f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)
        )


def _over_time(played: Played) -> Iterator[str]:
    """What lies at each site, at even steps of the time."""
    moments_s = [played.days * DAY_S * step / STEPS for step in range(STEPS + 1)]
    rows = [[site.present_at(moment_s) for site in played.sites] for moment_s in moments_s]
    labels = [f"  on day {moment_s / DAY_S:.3g}" for moment_s in moments_s]
    yield "space over time"
    for label, row in zip(labels, rows, strict=True):
        yield f"{label:<14}" + "".join(f"  {show(size, Unit.BYTES):>8}" for size in row)


def _etcd(plan: Plan) -> Iterator[str]:
    etcd = plan.etcd
    clusters = "1 volume" if etcd.volumes == 1 else f"{etcd.volumes} volumes, each with an etcd of its own"
    yield f"etcd: {clusters}, of {etcd.members} members"
    yield f"  {show_count(etcd.files)} files, a database of {show(etcd.database_bytes, Unit.BYTES)} in all"
    yield (
        f"  {show_count(round(etcd.peak_requests_s))} transactions a second at the peak, "
        f"{show_count(round(etcd.average_requests_s))} on average, "
        f"and {show_count(round(etcd.renewals_s))} lease renewals"
    )
    if etcd.quorum_s is None:
        yield "  the round trip of a commit: the links do not say theirs"
    elif etcd.quorum_s:
        trip = show(etcd.quorum_s, Unit.SECONDS)
        yield f"  a commit takes a round trip of {trip} from {plan.lead}, where the leader should be"
    else:
        yield f"  a commit stays within {plan.lead}, which holds a majority of the members"


def _link(plan: LinkPlan) -> Iterator[str]:
    link = plan.link
    has = f", has {show_bits(link.rate_bytes_s)}" if link.rate_bytes_s else ""
    yield f"link {link.first} - {link.second}: needs {show_bits(plan.peak)}, {show_bits(plan.average)} on average{has}"
    for flow in plan.flows:
        yield f"  {flow.what} from {flow.source} to {flow.target}: {show(flow.average, Unit.BYTES_S)} on average"
    if plan.publish_s:
        yield f"  published weights have crossed after {show(plan.publish_s, Unit.SECONDS)}"


def _settings(plan: Plan) -> Iterator[str]:
    retention, services = plan.given.retention, plan.given.services
    yield "configure:"
    yield (
        f"  checkpoints to keep: the last {retention.keep_last:.0f}, and every {retention.keep_every:.0f}th "
        f"for {retention.keep_for_s / 86_400:g} days"
    )
    yield f"  apollofs gc: every {show(retention.gc_interval_s, Unit.SECONDS)}, --grace {retention.gc_grace_s:.0f}s"
    yield f"  apollofs format: --block-size {services.block_bytes / 2**20:g}M"
    disk_bytes = max(site.node.disk_bytes for site in plan.sites)
    yield f"  apollofs mount: -o cache_size={math.ceil(disk_bytes / 2**30)}G"
    yield f"  etcd: --quota-backend-bytes={services.etcd_quota_bytes:.0f}"


def _two(first: float, second: float, unit: Unit) -> str:
    return f"{show(first, unit)}, {show(second, unit)}"


def _best(interval_s: float) -> str:
    return show(interval_s, Unit.SECONDS) if math.isfinite(interval_s) else "-"


def _goodput(share: float) -> str:
    return show(share, Unit.SHARE) if share else "-"


def _late(site: PlayedSite, share: float) -> str:
    lags = [lag.lag_s for lag in site.publish_lags]
    return show(percentile(lags, share), Unit.SECONDS) if lags else "-"
