"""`changes archive`, `changes status` and `changes forget`: the archive of the change log, and its readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import json_option, print_json, print_pairs, print_table, size_text, time_text
from apollofs.fs.mount_options import parse_size
from apollofs.fs.user_error import UserError
from apollofs.metadata.store import Store

if TYPE_CHECKING:
    from apollofs.metadata.changes.compaction import CompactionOptions


@click.command()
@meta_url_argument
@click.option("--once", is_flag=True, help="Archive everything up to now, and end.")
@click.option("--site", default="", metavar="NAME", help="In whose store segments go; otherwise the first site's.")
@click.option("--every", default="1m", show_default=True, metavar="AGE", help="A change waits so long at most.")
@click.option("--keep", default="", metavar="AGE", help="Remove segments that are older.")
@click.option("--keep-size", default="", metavar="SIZE", help="Remove the oldest segments past this size in all.")
@click.option("--compact", is_flag=True, help="Let etcd forget what is archived. It concerns the whole etcd.")
@click.option(
    "--compact-keep", default="1h", show_default=True, metavar="AGE", help="What was archived since stays in etcd."
)
@click.option(
    "--unarchived", multiple=True, metavar="VOLUME", help="A volume in this etcd whose log may be lost by --compact."
)
@click.option("--shared-etcd", is_flag=True, help="Compact although others than apollofs keep keys in this etcd.")
@click.option(
    "--lease-ttl", default=15, show_default=True, type=click.IntRange(2, 3600), metavar="S", help="See docs/CHANGES.md."
)
@password_file_option
@json_option
def archive(meta_url: str, once: bool, site: str, every: str, password_file: str, as_json: bool, **given: Any) -> None:
    """Move the change log from etcd's history to segments in the store of bodies, where it is read by the same call.

    One archiver of a volume works, others wait to take over. It may be interrupted or killed at any time: the next one
    goes on. With --compact etcd's history is shortened behind it, as far as all volumes in this etcd are archived.
    """
    from apollofs.fs.change_archive import ArchiveRun, archive_changes
    from apollofs.fs.log import start_logging
    from apollofs.metadata.changes.archiver import ArchiveOptions

    access = access_of(meta_url, password_file)
    keep_bytes = parse_size(given["keep_size"]) if given["keep_size"] else 0
    keep_s = parse_age(given["keep"]) if given["keep"] else 0.0
    options = ArchiveOptions(
        flush_s=parse_age(every), keep_s=keep_s, keep_bytes=keep_bytes, lease_ttl_s=given["lease_ttl"]
    )
    run = ArchiveRun(site, once, options, compaction_of(given), places.blob_ca_file())
    start_logging(None)
    done = with_store(access, lambda store: archive_changes(store, access.url.volume, run))
    report = asdict(done.report)
    if as_json:
        facts = {"compacted": done.compacted, "held_back": done.held_back}
        print_json({"volume": access.url.volume, **report, **facts})
        return
    moved = f"{done.report.changes} changes in {done.report.segments} segments"
    click.echo(f"archived up to revision {done.report.through}: {moved}")
    if done.compacted:
        click.echo(f"etcd has forgotten what was before revision {done.compacted}")
    if done.held_back:
        click.echo(f"not compacted: {done.held_back}")


def compaction_of(given: Mapping[str, Any]) -> CompactionOptions | None:
    """What the options `compact`, `compact_keep`, `unarchived` and `shared_etcd` ask for. Raises UserError."""
    from apollofs.metadata.changes.compaction import KEEP_S_MIN, CompactionOptions

    if not given["compact"]:
        return None
    keep_s = parse_age(given["compact_keep"])
    if keep_s < KEEP_S_MIN:
        raise UserError(
            f"--compact-keep must be at least {KEEP_S_MIN / 60:g}m: mounts rely on so much of etcd's history"
        )
    return CompactionOptions(keep_s, frozenset(given.get("unarchived", ())), given.get("shared_etcd", False))


@click.command()
@meta_url_argument
@password_file_option
@json_option
def status(meta_url: str, password_file: str, as_json: bool) -> None:
    """How far the log is archived, what the archive holds, and how far each group has read."""
    from apollofs.fs.change_archive import archive_facts

    access = access_of(meta_url, password_file)
    facts = with_store(access, lambda store: archive_facts(store, access.url.volume))
    if as_json:
        print_json(facts)
        return
    print_pairs(
        {
            "archived up to": facts["through"] or "nothing",
            "store is at": facts["revision"],
            "segments": f"{facts['segments']}, {facts['changes']} changes, {size_text(facts['size_bytes'])}",
            "from": f"{facts['first']}  {time_text(facts['first_time_s'])}" if facts["segments"] else "-",
            "archiver": facts["archiver"] or "none",
        }
    )
    rows = [(group["name"], group["position"], group["reader"] or "-") for group in facts["groups"]]
    print_table(("group", "position", "read by"), rows, empty="no group has read")


@click.command()
@meta_url_argument
@click.argument("group")
@password_file_option
def forget(meta_url: str, group: str, password_file: str) -> None:
    """Forget how far a group has read. Refused while it is being read for."""
    from apollofs.metadata.changes.groups import forget_group
    from apollofs.metadata.keys import Keys

    access = access_of(meta_url, password_file)

    async def work(store: Store) -> None:
        await forget_group(store, Keys(access.url.volume), group)

    with_store(access, work)
    click.echo(f"group {group!r} begins anew")
