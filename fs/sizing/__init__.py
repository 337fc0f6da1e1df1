"""Sizing: from what a fleet of GPUs does to what must be bought and configured for it. Pure; it asks no server.

- `Assumptions`: every number that a plan stands on, with its unit, its bounds and its source (`assumptions.py`).
- `Fleet`, `Site`, `Link`: where the GPUs are, and what joins the places (`fleet.py`).
- `make_plan(fleet, assumptions)` gives a `Plan`: throughput, space, servers, etcd and links (`planning.py`).
- `play(plan, days, seed)` gives a `Played`: days of failures, saves, clean-ups and publishes (`play.py`).
- `read_input`: both from a TOML file (`reading.py`); `plan_text`, `played_text`, `draw`: what people look at.

Sizes are decimal (1 TB = 10^12 bytes), as vendors and S3 count them; times are seconds. What can't be met raises
UserError with the figure that stands in the way. `docs/SIZING.md` has every formula.
"""

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.fleet import Fleet, Link, Site
from apollofs.fs.sizing.planning import make_plan
from apollofs.fs.sizing.play import play
from apollofs.fs.sizing.played import Played
from apollofs.fs.sizing.plots import draw
from apollofs.fs.sizing.reading import read_input
from apollofs.fs.sizing.report import plan_text, played_text
from apollofs.fs.sizing.results import Plan

__all__ = [
    "Assumptions",
    "Fleet",
    "Link",
    "Plan",
    "Played",
    "Site",
    "draw",
    "make_plan",
    "plan_text",
    "play",
    "played_text",
    "read_input",
]
