"""`gc`: remove what nobody can read any more."""

from __future__ import annotations

import re
from dataclasses import asdict

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.errors import FAILED
from apollofs.fs.cli.output import json_option, print_json, print_pairs, size_text
from apollofs.fs.collection import CollectOptions, CollectReport
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

_AGE = re.compile(r"(\d+(?:\.\d+)?) *([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
AGE_MAX_S = 100 * 365 * 86_400.0


def parse_age(text: str) -> float:
    """Seconds of "90", "30m", "12h", "7d". Raises UserError."""
    matched = _AGE.fullmatch(text.strip())
    seconds = float(matched[1]) * _SECONDS[matched[2]] if matched else AGE_MAX_S + 1
    if seconds > AGE_MAX_S:
        raise UserError(f"{text!r} is no age: write it as 90, 30m, 12h or 7d")
    return seconds


@click.command()
@meta_url_argument
@click.option("--dry-run", is_flag=True, help="Ask all mounts and report; remove nothing.")
@click.option(
    "--grace", default="1h", show_default=True, metavar="AGE", help="What was dropped less than this ago stays."
)
@click.option(
    "--rate", default=0.0, type=click.FloatRange(0, 1e6), metavar="N", help="At most N objects a second; 0: no bound."
)
@click.option("--uploads/--no-uploads", default=True, help="Also look for uploads that were never committed.")
@click.option(
    "--repack",
    default=CollectOptions().pack_used_min,
    show_default="1/3",
    type=click.FloatRange(0, 1),
    metavar="PART",
    help="Objects that small files share are rewritten when less than this part of them is still used; 0: never.",
)
@password_file_option
@json_option
def gc(
    meta_url: str,
    dry_run: bool,
    grace: str,
    rate: float,
    uploads: bool,
    repack: float,
    password_file: str,
    as_json: bool,
) -> int:
    """Remove bodies that no file refers to any more and no mount uses.

    That is what unlinked and changed files had, what mounts that died have uploaded and never committed, and what is
    dead of objects that small files share. It may run beside mounts, one at a time for a volume. Interrupted, the next
    run goes on. The exit status is 1 if something that should have gone could not be removed.
    """
    from apollofs.blobstore import BlobStoreOptions
    from apollofs.fs.collecting import collect

    access = access_of(meta_url, password_file)
    options = CollectOptions(parse_age(grace), rate, dry_run, uploads, repack)
    stores = BlobStoreOptions(ca_file=places.blob_ca_file())
    report = with_store(access, lambda store: collect(store, access.url.volume, options, stores, places.version()))
    if as_json:
        kept = [{"ino": one.ino, "name": name_text(one.name), "why": one.why} for one in report.kept]
        print_json({"volume": access.url.volume, "dry_run": dry_run, **asdict(report), "kept": kept})
    else:
        _print_report(report, dry_run=dry_run)
    return FAILED if report.errors else 0


def _print_report(report: CollectReport, *, dry_run: bool) -> None:
    would = "would be removed" if dry_run else "removed"
    rewritten = "would be rewritten" if dry_run else "rewritten"
    facts = {
        f"tombstones {would}": str(report.tombstones),
        f"blobs {would}": f"{report.dropped.blobs}, {size_text(report.dropped.bytes)}",
        f"uploads {would}": f"{report.uploads.blobs}, {size_text(report.uploads.bytes)}",
        "blobs that others share": str(report.shared_blobs),
        f"packs {rewritten}": f"{report.rewritten.blobs}, {size_text(report.rewritten.bytes)} still used",
        "within their grace": f"{report.young} tombstones, {report.young_uploads} uploads",
    }
    facts.update((f"kept: {reason}", str(count)) for reason, count in report.kept_by_reason.items())
    print_pairs(facts)
    for one in report.kept:
        click.echo(f"kept  inode {one.ino:#x}  {name_text(one.name) or '-'}  {one.why}")
    for mount in report.silent_mounts:
        click.echo(f"no answer from {mount}: nothing that it may use was removed")
    for error in report.errors:
        click.echo(f"failed: {error}")
