"""A plan and a play as plain data, for JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.played import Played
from apollofs.fs.sizing.results import Plan

SITE_SUMS = ("peak", "available", "reads", "writes")


def plan_data(plan: Plan) -> dict[str, Any]:
    """Bytes, bytes a second and seconds; what has no end (time between failures that never come) is None."""
    totals = ("gpus", "gpu_racks", "available", "paper", "usable", "raw")
    return {
        "totals": {name: getattr(plan, name) for name in totals},
        "lead": plan.lead,
        "sites": {site.shape.name: _site(site) for site in plan.sites},
        "etcd": _plain(plan.etcd),
        "links": [_plain(link) for link in plan.links],
        "shortfalls": list(plan.shortfalls),
        "assumptions": {about.name: about.value for about in plan.given.listed()},
    }


def played_data(played: Played) -> dict[str, Any]:
    """Figures and lags; not the single activities."""
    sites = {}
    for site in played.sites:
        fields = {one.name: getattr(site, one.name) for one in dataclasses.fields(site) if one.name != "activities"}
        sites[site.name] = _plain(fields)
    return {"days": played.days, "seed": played.seed, "publishes": played.publishes, "sites": sites}


def assumptions_data(given: Assumptions) -> list[dict[str, Any]]:
    """Every assumption with all that is known of it."""
    return [_plain(about) for about in given.listed()]


def _site(site: Any) -> dict[str, Any]:
    data: dict[str, Any] = _plain(site)
    data["throughput"] |= {name: getattr(site.throughput, name) for name in SITE_SUMS}
    data["throughput"]["per_rack"] = site.per_rack
    data["space"] |= {name: getattr(site.space, name) for name in ("paper", "usable", "raw")}
    return data


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and infinities as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
