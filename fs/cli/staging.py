"""`staging list|recover|drop`: what mounts that died, or lost their session, have left on this host uncommitted."""

from __future__ import annotations

import glob
import os
from datetime import UTC, datetime
from typing import Any

import click

from apollofs.fs.cli.output import json_option, print_json, print_table
from apollofs.fs.leftovers import Leftover, leftovers
from apollofs.fs.leftovers import drop as drop_leftover
from apollofs.fs.leftovers import recover as recover_leftover
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

cache_dir_option = click.option(
    "--cache-dir", required=True, metavar="DIR", help="The cache directory of the mounts.", type=click.Path()
)


@click.group()
def staging() -> None:
    """List, recover and drop files whose mount ended before they were committed.

    What was fsynced or closed without an error is committed and not listed.
    """


def _all(cache_dir: str) -> list[Leftover]:
    if not os.path.isdir(cache_dir):
        raise UserError(f"{cache_dir} is no directory: give the --cache-dir of the mounts")
    volumes = glob.glob(os.path.join(glob.escape(cache_dir), "volume-*"))
    return [leftover for volume in sorted(volumes) for leftover in leftovers(volume)]


def _one(cache_dir: str, name: str) -> Leftover:
    for leftover in _all(cache_dir):
        if leftover.name == name:
            return leftover
    raise UserError(f"nothing of the name {name!r} is left in {cache_dir}: see `apollofs staging list`")


def _facts(leftover: Leftover) -> dict[str, Any]:
    return {
        "id": leftover.name,
        "name": name_text(leftover.place[1]) if leftover.place is not None else "",
        "inode": f"{leftover.ino:#x}",
        "bytes": leftover.size_bytes,
        "written": datetime.fromtimestamp(leftover.written_ns / 1e9, UTC).isoformat(timespec="seconds"),
        "in_use": leftover.in_use,
    }


@staging.command("list")
@cache_dir_option
@json_option
def list_(cache_dir: str, as_json: bool) -> None:
    """List what is left, with the name under which each file was opened."""
    found = [_facts(leftover) for leftover in _all(cache_dir)]
    if as_json:
        print_json(found)
    else:
        head = ("id", "name", "inode", "bytes", "written", "in use")
        print_table(head, [tuple(one.values()) for one in found], empty="nothing is left")


@staging.command()
@click.argument("name", metavar="ID")
@click.argument("target", metavar="FILE", type=click.Path())
@cache_dir_option
def recover(name: str, target: str, cache_dir: str) -> None:
    """Copy the bytes of one to a new FILE, on a mount or elsewhere. It stays listed until it is dropped."""
    leftover = _one(cache_dir, name)
    try:
        recover_leftover(leftover, target)
    except OSError as exc:
        raise UserError(f"{target} can't be written: {exc.strerror}") from exc
    click.echo(f"{leftover.size_bytes} bytes are in {target} now")


@staging.command()
@click.argument("names", metavar="ID...", nargs=-1, required=True)
@cache_dir_option
def drop(names: tuple[str, ...], cache_dir: str) -> None:
    """Delete them for good."""
    for leftover in [_one(cache_dir, name) for name in names]:
        if leftover.in_use:
            raise UserError(f"{leftover.name} is still written by a process; end that first")
        drop_leftover(leftover)
    click.echo(f"{len(names)} dropped")
