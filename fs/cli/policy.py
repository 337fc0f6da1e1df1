"""`policy set|get|clear|list`: which sites have copies of what is in a directory."""

from __future__ import annotations

import os
from typing import Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, path_argument, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import json_option, print_json, print_pairs, print_table
from apollofs.fs.policy_commands import Applied, PolicyCommands
from apollofs.fs.policy_facts import policy_facts
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text
from apollofs.metadata.policy import Policy
from apollofs.metadata.store import Store

BOUND_MAX_S = 7 * 86_400


@click.group()
def policy() -> None:
    """Which sites have copies of what is in a directory, and when. PATH is in the volume: /datasets."""


@policy.command("set")
@meta_url_argument
@path_argument
@click.option(
    "--commit", default="", metavar="SITE,...", help="fsync and close return when these sites have the bytes."
)
@click.option("--commit-any", default=0, type=click.IntRange(0, 255), metavar="N", help="As --commit: any N sites.")
@click.option("--async", "soon", default="", metavar="SITE,...", help="These sites get the bytes soon.")
@click.option("--bound", default="60s", show_default=True, metavar="AGE", help="Later than this counts as late.")
@click.option("--read", default="", metavar="SITE,...", help="These sites keep what is read there.")
@password_file_option
def set_(
    meta_url: str, path: str, commit: str, commit_any: int, soon: str, bound: str, read: str, password_file: str
) -> None:
    """Set the policy of a directory and all below it; what is there already follows in the background."""
    access = access_of(meta_url, password_file)
    bound_s = parse_age(bound)
    if not 1 <= bound_s <= BOUND_MAX_S:
        raise UserError(f"--bound must be from 1s to 7d, not {bound}")
    if not (commit or commit_any > 1 or soon or read):
        raise click.UsageError("name sites with --commit, --commit-any, --async or --read")

    async def work(store: Store) -> None:
        commands = PolicyCommands(store, access.url.volume, places.version())
        ids = await commands.site_ids()
        if commit_any > len(ids):
            raise UserError(f"the volume has {len(ids)} sites, not {commit_any}")
        chosen = Policy(_ids(commit, ids), commit_any, _ids(soon, ids), round(bound_s), _ids(read, ids))
        await commands.set(os.fsencode(path), chosen)

    with_store(access, work)
    click.echo(f"{path} has a policy now; `apollofs policy get` shows how far what was there before has come")


def _ids(names: str, ids: dict[str, int]) -> tuple[int, ...]:
    """Raises UserError for a site that the volume does not have."""
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in ids:
            raise UserError(f"the volume has no site {name!r}: see `apollofs site list`")
        found.append(ids[name])
    return tuple(sorted(set(found)))


@policy.command()
@meta_url_argument
@path_argument
@password_file_option
@json_option
def get(meta_url: str, path: str, password_file: str, as_json: bool) -> None:
    """The policy that applies in a directory, where it was set, and how far each site has come."""
    access = access_of(meta_url, password_file)

    async def work(store: Store) -> tuple[Applied | None, dict[str, int]]:
        commands = PolicyCommands(store, access.url.volume, places.version())
        return await commands.get(os.fsencode(path)), await commands.site_ids()

    found, ids = with_store(access, work)
    facts = _facts(found, ids) if found is not None else {}
    if as_json:
        print_json(facts)
    elif not facts:
        click.echo(f"no policy applies in {path}: bodies are at the site of the mount that writes them")
    else:
        print_pairs({name: _text(value) for name, value in facts.items()})


@policy.command()
@meta_url_argument
@path_argument
@password_file_option
def clear(meta_url: str, path: str, password_file: str) -> None:
    """Take a directory's own policy away: that of its parent applies again. Copies that were made stay."""
    access = access_of(meta_url, password_file)
    with_store(
        access, lambda store: PolicyCommands(store, access.url.volume, places.version()).set(os.fsencode(path), None)
    )
    click.echo(f"{path} has no policy of its own any more")


@policy.command("list")
@meta_url_argument
@password_file_option
@json_option
def list_(meta_url: str, password_file: str, as_json: bool) -> None:
    """All policies of a volume."""
    access = access_of(meta_url, password_file)

    async def work(store: Store) -> tuple[list[Applied], dict[str, int]]:
        commands = PolicyCommands(store, access.url.volume, places.version())
        return await commands.list(), await commands.site_ids()

    found, ids = with_store(access, work)
    facts = [_facts(each, ids) for each in found]
    if as_json:
        print_json(facts)
    else:
        columns = ("directory", "commit", "commit any", "async", "bound", "read", "progress")
        print_table(columns, [[_text(value) for value in each.values()] for each in facts], empty="no policies")


def _facts(applied: Applied, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "directory": name_text(applied.path) if applied.path is not None else "(removed)",
        **policy_facts(applied.policy, {number: name for name, number in ids.items()}),
        "progress": {site: _progress(applied, site) for site in applied.done},
    }


def _progress(applied: Applied, site: str) -> str:
    if applied.done[site]:
        return "done"
    return f"{applied.walked[site]} files so far" if site in applied.walked else "waits for the site's agent"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each}" for name, each in value.items()) or "-"
    if isinstance(value, list):
        return ",".join(value) or "-"
    return str(value)
