"""`plan`: what must be bought and configured for a fleet of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from apollofs.fs.cli.errors import FAILED
from apollofs.fs.cli.output import json_option, print_json
from apollofs.fs.user_error import UserError

if TYPE_CHECKING:
    from apollofs.fs.sizing import Assumptions, Fleet, Played

INPUT_BYTES_MAX = 1 << 20

NAMED = {
    "params": ("N", "Parameters of the model, such as 405B."),
    "optimizer_bytes_per_param": ("BYTES", "What a checkpoint holds besides the weights."),
    "ranks_per_gpu": ("N", "Processes a training GPU."),
    "inference_share": ("SHARE", "GPUs that serve or roll out."),
    "save_interval": ("TIME", "From one checkpoint to the next."),
    "save_stall": ("TIME", "A checkpoint is durable after this."),
    "failures_a_day": ("N", "Failures of a site's training a day."),
    "dataset_passes": ("N", "How often a run reads its datasets."),
    "publishes_an_hour": ("N", "Weights handed over to inference."),
    "keep_last": ("N", "Newest checkpoints that stay."),
    "keep_every": ("K", "Every Kth checkpoint stays for --keep-for."),
    "keep_for": ("TIME", "How long every Kth stays."),
}
"""Assumptions with an option of their own; all others are changed with --set."""


def named_options(command: Callable[..., int]) -> Callable[..., int]:
    """An option for each name of NAMED."""
    for name, (metavar, text) in reversed(NAMED.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)(command)
    return command


@click.command()
@click.option("--gpus", metavar="N", help="GPUs of a fleet at one site.")
@click.option("--site", "sites", multiple=True, metavar="NAME=GPUS[,inference=SHARE]", help="One of several sites.")
@click.option("--link", "links", multiple=True, metavar="A,B=RATE[,ROUND_TRIP]", help="What joins two sites.")
@click.option("--input", "file", type=click.Path(path_type=Path), help="Sites, links and assumptions from a TOML file.")
@named_options
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change any assumption.")
@click.option("--assumptions", "listing", is_flag=True, help="List all assumptions and their sources; plan nothing.")
@click.option("--simulate", is_flag=True, help="Play days of failures, saves, clean-ups and publishes.")
@click.option("--days", default=30.0, show_default=True, metavar="N", help="How many days to play.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="The same seed plays the same days.")
@click.option(
    "--plots", type=click.Path(path_type=Path), metavar="DIRECTORY", help="Draw the played days as PNG files."
)
@json_option
def plan(
    gpus: str | None,
    sites: tuple[str, ...],
    links: tuple[str, ...],
    file: Path | None,
    settings: tuple[str, ...],
    listing: bool,
    simulate: bool,
    days: float,
    seed: int,
    plots: Path | None,
    as_json: bool,
    **named: str | None,
) -> int:
    """Say what a fleet of GPUs needs: throughput, space, servers, etcd and links.

    All figures follow from assumptions, which --assumptions lists with their sources. What is on the command line comes
    before the file. The exit status is 1 if a given link can't carry what it must.
    """
    from apollofs.fs.sizing import draw, make_plan, play

    if plots is not None and not simulate:
        raise click.UsageError("--plots draws what --simulate plays: give both")
    changed = {name: value for name, value in named.items() if value is not None} | _settings(settings)
    fleet, given = _input(gpus, sites, links, file, changed, needs_fleet=not listing)
    if listing or fleet is None:
        _print_assumptions(given, as_json=as_json)
        return 0
    made = make_plan(fleet, given)
    played = play(made, days, seed) if simulate else None
    pictures = draw(played, plots) if played is not None and plots is not None else []
    _print(made, played, pictures, as_json=as_json)
    return FAILED if made.shortfalls else 0


def _settings(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} changes nothing: write NAME=VALUE")
        found[name.strip().replace("-", "_")] = value
    return found


def _input(
    gpus: str | None,
    sites: tuple[str, ...],
    links: tuple[str, ...],
    file: Path | None,
    changed: Mapping[str, str],
    *,
    needs_fleet: bool,
) -> tuple[Fleet | None, Assumptions]:
    """The fleet and the assumptions, of the file and the command line."""
    from apollofs.fs.sizing import Assumptions, Fleet, Site, read_input
    from apollofs.fs.sizing.fleet import parse_link, parse_site
    from apollofs.fs.sizing.units import Unit, parse

    if gpus is not None and sites:
        raise click.UsageError("--gpus is for one site; give all of them with --site")
    found = read_input(_text(file) if file is not None else "")
    given = Assumptions().changed(found.values).changed(changed)
    if not needs_fleet:
        return None, given
    places = tuple(map(parse_site, sites)) or found.sites
    joined = tuple(map(parse_link, links)) or found.links
    if gpus is not None:
        places, joined = (Site("here", int(parse(gpus, Unit.WHOLE))),), ()
    return Fleet(places, joined), given


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(INPUT_BYTES_MAX + 1)
    if len(data) > INPUT_BYTES_MAX:
        raise UserError(f"{file} is larger than {INPUT_BYTES_MAX:,} bytes: no plan is")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UserError(f"{file} is no text in UTF-8") from exc


def _print_assumptions(given: Assumptions, *, as_json: bool) -> None:
    from apollofs.fs.sizing.plain import assumptions_data
    from apollofs.fs.sizing.report import assumptions_text

    if as_json:
        print_json(assumptions_data(given))
    else:
        click.echo(assumptions_text(given))


def _print(made: Any, played: Played | None, pictures: list[Path], *, as_json: bool) -> None:
    from apollofs.fs.sizing import plan_text, played_text
    from apollofs.fs.sizing.plain import plan_data, played_data

    if as_json:
        data = plan_data(made)
        if played is not None:
            data["played"] = played_data(played)
            data["plots"] = [str(path) for path in pictures]
        print_json(data)
        return
    click.echo(plan_text(made))
    if played is not None:
        click.echo(f"\n{played_text(played)}")
    for path in pictures:
        click.echo(f"drawn: {path}")
