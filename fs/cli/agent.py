"""`agent META_URL --site NAME` runs a site's agent; `agent status META_URL` says how far all of them have come."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.changes_archive import compaction_of
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import age_text, json_option, print_json, print_table, size_text
from apollofs.fs.mount_options import parse_address, parse_size
from apollofs.metadata.records import MountRecord
from apollofs.metadata.store import Store

KEPT_BYTES = 256 << 20
"""Of free memory: more than all blocks that it has in memory at once (16 of 8 MiB unless formatted otherwise)."""


class _RunsByDefault(click.Group):
    """`agent META_URL ...` is `agent run META_URL ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunsByDefault)
def agent() -> None:
    """The agent of a site: copies bodies that policies want there, collects garbage, archives the change log, and
    applies checkpoint retention.

    `apollofs agent META_URL --site NAME` runs one, in the foreground.
    """


@agent.command()
@meta_url_argument
@click.option("--site", required=True, metavar="NAME", help="The site whose store it fills.")
@click.option("--rate", default="0", metavar="SIZE", help="Copy at most so much in a second; 0: no bound.")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(1, 64), help="Batches side by side.")
@click.option("--gc-every", default="1h", show_default=True, metavar="AGE", help="Between collections; 0: never.")
@click.option("--gc-grace", default="1h", show_default=True, metavar="AGE", help="As --grace of `apollofs gc`.")
@click.option("--archive/--no-archive", default=True, show_default=True, help="Archive the change log.")
@click.option("--archive-every", default="1m", show_default=True, metavar="AGE", help="A change waits so long at most.")
@click.option("--archive-keep", default="", metavar="AGE", help="Remove segments that are older.")
@click.option("--compact/--no-compact", default=True, show_default=True, help="Have etcd forget what is archived.")
@click.option(
    "--compact-keep", default="1h", show_default=True, metavar="AGE", help="As of `apollofs changes archive`."
)
@click.option("--retention-every", default="10m", show_default=True, metavar="AGE", help="Between runs; 0: never.")
@click.option(
    "--retention-rate",
    default=200.0,
    show_default=True,
    type=click.FloatRange(0, 1e6),
    metavar="N",
    help="It removes at most N names a second; 0: no bound.",
)
@click.option("--lease-ttl", default=15, show_default=True, type=click.IntRange(2, 600), help="Seconds of silence.")
@click.option("--metrics", default="", metavar="[HOST:]PORT", help="Serve counters for Prometheus.")
@click.option("--log-file", default="", metavar="FILE", help="Log there instead of standard error.")
@password_file_option
@click.pass_context
def run(ctx: click.Context, /, meta_url: str, site: str, password_file: str, **given: Any) -> None:
    """Be a candidate for a site's agent. Any number may run; one at a time does the work."""
    from apollofs.blobstore import BlobStoreOptions
    from apollofs.fs.agent import AgentOptions
    from apollofs.fs.agent.serving import Serving, serve_agent
    from apollofs.fs.allocator import keep_buffers
    from apollofs.fs.daemon import ForegroundReadiness, NotifyReadiness
    from apollofs.fs.log import start_logging

    access = access_of(meta_url, password_file)
    options = AgentOptions(
        bytes_per_s=parse_size(given["rate"]),
        workers=given["workers"],
        gc_every_s=parse_age(given["gc_every"]),
        gc_grace_s=parse_age(given["gc_grace"]),
        retention_every_s=parse_age(given["retention_every"]),
        retention_ops_per_s=given["retention_rate"],
        lease_ttl_s=given["lease_ttl"],
        **_archiving(given),
    )
    metrics = parse_address(given["metrics"]) if given["metrics"] else None
    start_logging(given["log_file"] or None, debug=bool(ctx.find_root().obj))
    record = MountRecord(0, socket.gethostname(), os.getpid(), "", site, places.version(), 0)
    notify = places.notify_socket()
    readiness = NotifyReadiness(notify) if notify else ForegroundReadiness()
    serving = Serving(access.url.volume, record, BlobStoreOptions(ca_file=places.blob_ca_file()), options, metrics)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    keep_buffers(KEPT_BYTES)
    with_store(access, lambda store: serve_agent(store, serving, readiness))


def _archiving(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of AgentOptions that are about the change log. Raises UserError."""
    if not given["archive"]:
        return {}
    from apollofs.metadata.changes.archiver import ArchiveOptions

    keep_s = parse_age(given["archive_keep"]) if given["archive_keep"] else 0.0
    every_s = parse_age(given["archive_every"])
    archive = ArchiveOptions(flush_s=every_s, keep_s=keep_s, lease_ttl_s=given["lease_ttl"])
    return {"archive": archive, "compaction": compaction_of(given)}


@agent.command()
@meta_url_argument
@password_file_option
@json_option
def status(meta_url: str, password_file: str, as_json: bool) -> None:
    """Each site's agent: who it is, and its backlog, lag and rate as it last wrote them down."""
    access = access_of(meta_url, password_file)

    async def work(store: Store) -> list[dict[str, Any]]:
        from apollofs.fs.agent.report import report

        return await report(store, access.url.volume)

    found = with_store(access, work)
    if as_json:
        print_json(found)
        return
    columns = (
        *("site", "agent", "backlog", "lag", "rate", "copied", "late", "failures", "given up", "away", "retired"),
        *("moving", "seen"),
    )
    print_table(columns, [_row(each) for each in found], empty="no sites")


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    seen = age_text(time.time() - facts["updated_s"]) + " ago" if facts["updated_s"] else "never"
    return (
        facts["site"],
        facts["agent"] or "none",
        str(facts["backlog"]),
        f"{facts['lag_s']:.1f} s",
        f"{size_text(int(facts['rate']))}/s",
        size_text(int(facts["copied_bytes"])),
        str(facts["late_files"]),
        str(facts["failures"]),
        str(facts["given_up"]),
        str(facts["sites_away"]),
        str(facts["retired"]),
        facts["moving"] or "-",
        seen,
    )
