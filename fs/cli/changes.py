"""`changes`: what happened in a volume, in order; its archive; and who has read how far."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

import click

from apollofs.fs.change_facts import change_json
from apollofs.fs.change_feed import BEGINNING, NOW, FeedRequest, feed
from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, password_file_option, with_store
from apollofs.fs.cli.changes_archive import archive, forget, status
from apollofs.fs.cli.changes_kafka import KafkaOptions, kafka_options
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import json_option, time_text
from apollofs.fs.control import MountSilent, ask, socket_path
from apollofs.fs.mountinfo import absolute, mount_of
from apollofs.fs.user_error import UserError
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.journal import Kind
from apollofs.metadata.name_text import name_text
from apollofs.metadata.store import Store

ASK_DEADLINE_S = 10.0
READ = "read"


class ReadByDefault(click.Group):
    """Words that name no command are those of `read`: `apollofs changes --follow /weights`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in ctx.help_option_names:
            args = [READ, *args]
        return super().parse_args(ctx, args)


@click.group(cls=ReadByDefault)
def changes() -> None:
    """The change log: everything that happened to names, attributes and bodies, in order and without gaps.

    `apollofs changes [PATH]` is short for `apollofs changes read [PATH]`.
    """


@changes.command(READ)
@click.argument("where", metavar="[PATH | META_URL [PATH]]", nargs=-1)
@click.option(
    "--from",
    "start",
    default="",
    metavar="POS|beginning|now",
    help="Where to begin; otherwise at the beginning, with --follow now. A group goes on where it was.",
)
@click.option("--since", default="", metavar="AGE", help="Begin with what happened this long ago: 30m, 12h, 7d.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until interrupted.")
@click.option("--group", default="", metavar="NAME", help="Read for this group: one reader at a time, and it goes on.")
@kafka_options
@password_file_option
@json_option
def read(
    where: Sequence[str],
    start: str,
    since: str,
    follow: bool,
    group: str,
    kafka: KafkaOptions | None,
    password_file: str,
    as_json: bool,
) -> None:
    """What happened at PATH and below: a path on a mount, or META_URL and a path in the volume.

    Each line has its position, from which one can go on; with --json each line is one JSON object. If part of the log
    is gone the command fails and says from where on it can be had. With --kafka they are sent there, each exactly once.
    """
    from apollofs.blobstore import BlobStoreOptions
    from apollofs.fs.changes import open_changes
    from apollofs.metadata.format import list_sites

    if start and since:
        raise UserError("--from and --since exclude each other")
    meta_url, path = _place(where)
    access = access_of(meta_url, password_file)
    volume = access.url.volume
    since_ns = time.time_ns() - int(parse_age(since) * 1e9) if since else None
    begin = start or (NOW if follow and not group and kafka is None else BEGINNING)
    request = FeedRequest(begin, since_ns, follow, group, os.fsencode(path))

    async def work(store: Store) -> None:
        sites = {site.id: site.name for site in await list_sites(store, volume)}
        printer = _Printer(sites, as_json=as_json)
        async with open_changes(store, volume, BlobStoreOptions(ca_file=places.blob_ca_file())) as found:
            if kafka is None:
                await feed(store, volume, found, request, printer.deliver)
            else:
                await kafka.run(store, volume, found, request, sites, as_json)

    try:
        with_store(access, work)
    except BaseExceptionGroup as group_of:
        if not group_of.subgroup(BrokenPipeError):
            raise
        _close_output()
    except BrokenPipeError:
        _close_output()


changes.add_command(archive)
changes.add_command(status)
changes.add_command(forget)


def _close_output() -> None:
    """Whoever read has seen enough: nothing is to be said at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(where: Sequence[str]) -> tuple[str, str]:
    """(META_URL, path in the volume). Raises UserError."""
    if len(where) > 2 or (len(where) == 2 and "://" not in where[0]):
        raise UserError("give one path on a mount, or META_URL and a path in the volume")
    if where and "://" in where[0]:
        return where[0], where[1] if len(where) == 2 else "/"
    path = absolute(where[0] if where else ".")
    entry = mount_of(os.path.realpath(path))
    if entry is None or not entry.is_apollofs:
        raise UserError(f"{path} is not on an apollofs mount")
    try:
        facts = ask(socket_path(places.runtime_dir(), entry.device), "status", deadline_s=ASK_DEADLINE_S)
    except MountSilent as exc:
        raise UserError(f"{entry.mountpoint}: {exc}") from exc
    inside = os.path.relpath(os.path.realpath(path), entry.mountpoint)
    return str(facts["meta_url"]), os.path.normpath(os.path.join("/", entry.root, inside))


class _Printer:
    """Writes records to standard output: in a thread, so that a slow reader does not cost the group its lease."""

    def __init__(self, sites: Mapping[int, str], *, as_json: bool) -> None:
        self._sites = sites
        self._text = self._json if as_json else self._line

    async def deliver(self, records: Sequence[ChangeRecord]) -> None:
        import trio

        text = "".join([self._text(record) + "\n" for record in records])
        await trio.to_thread.run_sync(_write, text, abandon_on_cancel=True)

    def _line(self, record: ChangeRecord) -> str:
        change = record.change
        place = name_text(record.path) if record.path is not None else f"inode {change.ino:#x}"
        line = f"{record.position!s:<12}  {time_text(change.time_ns / 1e9)}  {change.kind.name.lower():<11}  {place}"
        if record.old_path is not None:
            word = "with" if change.kind == Kind.EXCHANGE else "from"
            line += f"  {word} {name_text(record.old_path)}"
        if change.attribute:
            line += f"  {name_text(change.attribute)}"
        if change.kind in (Kind.POLICY, Kind.RETENTION) and not change.value:
            line += "  cleared"
        return line

    def _json(self, record: ChangeRecord) -> str:
        return change_json(record, self._sites)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
