"""`retention set|get|clear|list|apply`: which checkpoints stay."""

from __future__ import annotations

import os
from typing import Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, path_argument, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.errors import FAILED
from apollofs.fs.cli.output import (
    age_text,
    json_option,
    print_json,
    print_pairs,
    print_table,
    size_text,
    time_text,
)
from apollofs.fs.mount_options import parse_size
from apollofs.fs.policy_facts import retention_facts
from apollofs.fs.retention import ApplyOptions, RetentionReport, apply_retention
from apollofs.fs.retention.commands import PlacedRetention, RetentionCommands
from apollofs.fs.retention.report import SHOWN_MAX, Line
from apollofs.fs.user_error import UserError
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.retention import Retention, read_retentions
from apollofs.metadata.store import Store


@click.group()
def retention() -> None:
    """Which checkpoints stay in a directory. PATH is in the volume: /checkpoints/run7."""


@retention.command("set")
@meta_url_argument
@path_argument
@click.option("--keep-last", type=int, metavar="N", help="The newest N complete ones stay, always; 1 if not given.")
@click.option("--keep-every", default=0, metavar="K", help="Of the others those whose step K divides.")
@click.option("--keep-for", default="", metavar="AGE", help="How long those stay; otherwise for ever.")
@click.option("--min-free", default="", metavar="SIZE", help="While less is free, the oldest of those go.")
@click.option("--capacity", default="0", metavar="SIZE", help="What the volume may hold; what it doesn't is free.")
@click.option("--pattern", "patterns", multiple=True, metavar="NAME", help="Names, as in run-*-{step}.pt; repeatable.")
@click.option("--marker", default="", metavar="NAME", help="Only a directory with this file in it is complete.")
@click.option("--settle", default="10m", show_default=True, metavar="AGE", help="What changed since may be incomplete.")
@click.option("--recursive", is_flag=True, help="In all directories below too, in each for itself.")
@password_file_option
def set_(meta_url: str, path: str, password_file: str, **given: Any) -> None:
    """Say which checkpoints stay in a directory; an agent removes the others.

    Without --keep-every, --keep-for and --min-free only the newest stay. With --keep-for or --min-free, and no
    --keep-every, all others stay as long as that says. `retention apply --dry-run` shows what would go.
    """
    access = access_of(meta_url, password_file)
    if given["keep_last"] is None and not any(given[name] for name in ("keep_every", "keep_for", "min_free")):
        raise click.UsageError("say what stays: --keep-last, --keep-every, --keep-for or --min-free")
    keep_for_s, min_free = round(parse_age(given["keep_for"] or "0")), parse_size(given["min_free"] or "0")
    chosen = Retention(
        last=1 if given["keep_last"] is None else given["keep_last"],
        every=given["keep_every"] or (1 if keep_for_s or min_free else 0),
        keep_for_s=keep_for_s,
        min_free_bytes=min_free,
        capacity_bytes=parse_size(given["capacity"]),
        patterns=given["patterns"],
        marker=given["marker"],
        settle_s=round(parse_age(given["settle"])),
        is_recursive=given["recursive"],
    )
    with_store(access, lambda store: _commands(store, access.url.volume).set(os.fsencode(path), chosen))
    click.echo(f"{path} has a retention policy now; `apollofs retention apply --dry-run` shows what would go")


@retention.command()
@meta_url_argument
@path_argument
@password_file_option
@json_option
def get(meta_url: str, path: str, password_file: str, as_json: bool) -> None:
    """The policy that applies in a directory, and where it was set."""
    access = access_of(meta_url, password_file)
    found = with_store(access, lambda store: _commands(store, access.url.volume).get(os.fsencode(path)))
    facts = _facts(found) if found is not None else {}
    if as_json:
        print_json(facts)
    elif found is None:
        click.echo(f"no retention policy applies in {path}: nothing is removed there")
    else:
        print_pairs(dict(zip(facts, _row(found), strict=True)))


@retention.command()
@meta_url_argument
@path_argument
@password_file_option
def clear(meta_url: str, path: str, password_file: str) -> None:
    """Take a directory's own policy away: nothing more is removed there, unless one above holds below too."""
    access = access_of(meta_url, password_file)
    with_store(access, lambda store: _commands(store, access.url.volume).clear(os.fsencode(path)))
    click.echo(f"{path} has no retention policy of its own any more")


@retention.command("list")
@meta_url_argument
@password_file_option
@json_option
def list_(meta_url: str, password_file: str, as_json: bool) -> None:
    """All retention policies of a volume."""
    access = access_of(meta_url, password_file)
    found = with_store(access, lambda store: _commands(store, access.url.volume).list())
    if as_json:
        print_json([_facts(each) for each in found])
        return
    columns = [name.removesuffix("_s").removesuffix("_bytes").replace("_", " ") for name in _facts(_NONE)]
    print_table(columns, [_row(each) for each in found], empty="no retention policies")


@retention.command("apply")
@meta_url_argument
@click.argument("path", default="")
@click.option("--dry-run", is_flag=True, help="Look, ask all mounts and report; remove nothing.")
@click.option(
    "--rate", default=0.0, type=click.FloatRange(0, 1e6), metavar="N", help="At most N names a second; 0: no bound."
)
@password_file_option
@json_option
def apply_(meta_url: str, path: str, dry_run: bool, rate: float, password_file: str, as_json: bool) -> int:
    """Remove now what no policy keeps; with PATH only as the policy says that was set there.

    What an agent does every --retention-every. One process does it at a time. Interrupted, the next run goes on. The
    exit status is 1 if something that should have gone could not be removed.
    """
    from apollofs.blobstore import BlobStoreOptions

    access = access_of(meta_url, password_file)
    stores = BlobStoreOptions(ca_file=places.blob_ca_file())

    async def work(store: Store) -> RetentionReport:
        volume = access.url.volume
        directory = await _own_policy(store, volume, path) if path else 0
        options = ApplyOptions(dry_run, rate, directory)
        return await apply_retention(store, volume, options, stores, places.version())

    report = with_store(access, work)
    if as_json:
        print_json(_report_facts(report, access.url.volume, dry_run=dry_run))
    else:
        _print_report(report, dry_run=dry_run)
    return FAILED if report.errors else 0


async def _own_policy(store: Store, volume: str, path: str) -> int:
    """The directory, which must have a policy of its own."""
    place = await _commands(store, volume).directory(os.fsencode(path))
    if place.ino not in await read_retentions(store, Keys(volume)):
        raise UserError(f"{path} has no retention policy of its own: see `apollofs retention list`")
    return place.ino


def _commands(store: Store, volume: str) -> RetentionCommands:
    return RetentionCommands(store, volume, places.version())


_NONE = PlacedRetention(None, Retention())


def _facts(found: PlacedRetention) -> dict[str, Any]:
    directory = name_text(found.path) if found.path is not None else "(removed)"
    return {"directory": directory, **retention_facts(found.retention)}


def _row(found: PlacedRetention) -> list[str]:
    policy = found.retention
    facts = _facts(found)
    facts["keep_every"] = policy.every or "none"
    facts["keep_for_s"] = age_text(policy.keep_for_s) if policy.keep_for_s else "ever"
    facts["min_free_bytes"] = size_text(policy.min_free_bytes) if policy.min_free_bytes else "-"
    facts["capacity_bytes"] = size_text(policy.capacity_bytes) if policy.capacity_bytes else "-"
    facts["patterns"] = " ".join(policy.patterns) or "the usual ones"
    facts["marker"] = policy.marker or "-"
    facts["settle_s"] = age_text(policy.settle_s)
    facts["recursive"] = "yes" if policy.is_recursive else "no"
    return [str(value) for value in facts.values()]


def _line_facts(line: Line) -> dict[str, Any]:
    checkpoint, verdict = line.verdict.checkpoint, line.verdict
    return {
        "path": line.path,
        "step": checkpoint.step,
        "goes": verdict.goes,
        "why": str(verdict.why),
        "detail": verdict.detail,
        "changed_s": checkpoint.changed_s,
        "size_bytes": checkpoint.size_bytes if checkpoint.looked else None,
    }


def _report_facts(report: RetentionReport, volume: str, *, dry_run: bool) -> dict[str, Any]:
    return {
        "volume": volume,
        "dry_run": dry_run,
        "directories": report.directories,
        "removed": report.removed,
        "removed_bytes": report.removed_bytes,
        "removed_files": report.removed_files,
        "brought_back": report.brought_back,
        "kept": report.kept,
        "kept_by_reason": report.kept_by_reason,
        "lacking_bytes": report.lacking_bytes,
        "errors": report.errors,
        "checkpoints": [_line_facts(line) for line in report.lines],
    }


def _print_report(report: RetentionReport, *, dry_run: bool) -> None:
    goes = "would go" if dry_run else "removed"
    rows = [
        (
            goes if line.verdict.goes else "stays",
            line.path,
            time_text(line.verdict.checkpoint.changed_s),
            size_text(line.verdict.checkpoint.size_bytes) if line.verdict.checkpoint.looked else "-",
            f"{line.verdict.why} {line.verdict.detail}".strip(),
        )
        for line in report.lines
    ]
    print_table(("", "checkpoint", "changed", "size", "why"), rows, empty="no checkpoints under a retention policy")
    if len(report.lines) == SHOWN_MAX:
        click.echo(f"only the first {SHOWN_MAX} are shown")
    facts = {"kept": str(report.kept), goes: f"{report.removed}, {size_text(report.removed_bytes)}"}
    if report.brought_back:
        facts["came back, as they were opened meanwhile"] = str(report.brought_back)
    if report.lacking_bytes:
        facts["still lacking of what should be free"] = size_text(report.lacking_bytes)
    print_pairs(facts)
    for error in report.errors:
        click.echo(f"failed: {error}")
