"""A plan's input from TOML: sites, links, and assumptions of other values."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.fleet import Link, Site
from apollofs.fs.sizing.units import Unit, parse
from apollofs.fs.user_error import UserError

SITE_KEYS = {"name", "gpus", "inference"}
LINK_KEYS = {"between", "rate", "round_trip"}


@dataclass(frozen=True, slots=True)
class Input:
    """What a file says; everything may be missing."""

    sites: tuple[Site, ...] = ()
    links: tuple[Link, ...] = ()
    values: Mapping[str, float | str] = field(default_factory=dict)


def read_input(text: str) -> Input:
    """Read a document. Raises UserError with what is wrong in it; an unknown key is wrong."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise UserError(f"this is no TOML: {exc}") from exc
    groups = {about.group: set[str]() for about in Assumptions().listed()}
    for about in Assumptions().listed():
        groups[about.group] |= {about.name, about.name.removesuffix("_s"), about.name.removesuffix("_bytes")}
    values: dict[str, float | str] = {}
    for key, value in data.items():
        if key in groups:
            values |= _group(key, value, groups[key])
        elif key not in ("gpus", "site", "link"):
            raise UserError(f"there is no {key!r} in a plan: gpus, site, link, {', '.join(groups)}")
    sites = tuple(_site(table) for table in _tables(data, "site", SITE_KEYS))
    if "gpus" in data:
        if sites:
            raise UserError("give gpus, or the sites with theirs, not both")
        sites = (Site("here", int(_number(data["gpus"], Unit.WHOLE))),)
    return Input(sites, tuple(_link(table) for table in _tables(data, "link", LINK_KEYS)), values)


def _group(name: str, table: Any, known: set[str]) -> dict[str, float | str]:
    if not isinstance(table, dict):
        raise UserError(f"{name} is a table: [{name}]")
    for key, value in table.items():
        if key not in known:
            raise UserError(f"there is no {key!r} in [{name}]; --assumptions lists what there is")
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise UserError(f"{key} in [{name}] is no number")
    return dict(table)


def _tables(data: Mapping[str, Any], name: str, keys: set[str]) -> list[dict[str, Any]]:
    """The tables [[name]], each with known keys only."""
    tables = data.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"write each {name} as a table of its own: [[{name}]]")
    for table in tables:
        for key in table:
            if key not in keys:
                raise UserError(f"there is no {key!r} in [[{name}]]: {', '.join(sorted(keys))}")
    return tables


def _site(table: Mapping[str, Any]) -> Site:
    if not isinstance(table.get("name"), str) or "gpus" not in table:
        raise UserError("a [[site]] needs a name and gpus")
    share = _number(table["inference"], Unit.SHARE) if "inference" in table else None
    return Site(table["name"], int(_number(table["gpus"], Unit.WHOLE)), share)


def _link(table: Mapping[str, Any]) -> Link:
    between = table.get("between")
    if not isinstance(between, list) or len(between) != 2 or not all(isinstance(name, str) for name in between):
        raise UserError('a [[link]] needs between = ["one site", "another"]')
    rate = _number(table["rate"], Unit.BYTES_S) if "rate" in table else 0.0
    trip = _number(table["round_trip"], Unit.SECONDS) if "round_trip" in table else None
    return Link(between[0], between[1], rate, trip)


def _number(value: Any, unit: Unit) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{value!r} is no {unit}")
    return parse(value if isinstance(value, str) else repr(value), unit)
