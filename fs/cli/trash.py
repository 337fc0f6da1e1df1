"""`trash`: what was unlinked and has not been collected yet."""

from __future__ import annotations

import os
import time

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import json_option, print_json, print_table, size_text, time_text
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

LISTED_MAX = 10_000


@click.group()
def trash() -> None:
    """What was unlinked, until `gc` removes it after its grace."""


@trash.command("list")
@meta_url_argument
@click.option("--since", default="7d", show_default=True, metavar="AGE", help="What was unlinked since then.")
@password_file_option
@json_option
def list_(meta_url: str, since: str, password_file: str, as_json: bool) -> None:
    """What was unlinked, oldest first, each with the number by which `trash restore` takes it."""
    from apollofs.fs.trash import Trash

    access = access_of(meta_url, password_file)
    since_ns = time.time_ns() - int(parse_age(since) * 1e9)
    found = with_store(access, lambda store: Trash(store, access.url.volume).list(since_ns, LISTED_MAX))
    facts = [
        {
            "ino": f"{one.stone.ino:#x}",
            "unlinked_s": one.stone.time_ns / 1e9,
            "size_bytes": one.inode.size_bytes,
            "path": name_text(one.path),
            "directory_exists": one.has_place,
        }
        for one in found
    ]
    if as_json:
        print_json(facts)
        return
    rows = [
        (
            f"{one.stone.ino:#x}",
            time_text(one.stone.time_ns / 1e9),
            size_text(one.inode.size_bytes),
            name_text(one.path),
        )
        for one in found
    ]
    print_table(("inode", "unlinked", "size", "path"), rows, empty="the trash is empty")
    if len(found) == LISTED_MAX:
        click.echo(f"only the first {LISTED_MAX} are shown: --since")


@trash.command()
@meta_url_argument
@click.argument("inode")
@click.option("--to", default="", metavar="PATH", help="Where to, in the volume; otherwise where it was.")
@password_file_option
@json_option
def restore(meta_url: str, inode: str, to: str, password_file: str, as_json: bool) -> None:
    """Give an unlinked file a name again: bytes, attributes and all. Refused while a mount still has it open."""
    from apollofs.fs.trash import Trash

    access = access_of(meta_url, password_file)
    try:
        number = int(inode, 16)
    except ValueError as exc:
        raise UserError(f"{inode!r} is no inode number: see `apollofs trash list`") from exc
    path = with_store(
        access,
        lambda store: Trash(store, access.url.volume).restore(number, os.fsencode(to), places.version()),
    )
    if as_json:
        print_json({"ino": f"{number:#x}", "path": name_text(path)})
    else:
        click.echo(f"restored as {name_text(path)}")
