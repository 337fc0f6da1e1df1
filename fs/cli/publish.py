"""`publish`: make a finished directory visible everywhere, when the sites that need it have it."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from apollofs.fs.cli import places
from apollofs.fs.cli.access import password_file_option, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import json_option, print_json, size_text
from apollofs.fs.cli.sealing import mounted_directory
from apollofs.fs.mountinfo import absolute, mount_of
from apollofs.fs.user_error import UserError


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--sites", required=True, metavar="A,B", help="Who must hold every body before it is renamed.")
@click.option("--wait", is_flag=True, help="Try again while a site can't be reached, instead of giving up.")
@click.option("--timeout", default="1h", show_default=True, metavar="AGE", help="How long --wait tries for a batch.")
@password_file_option
@json_option
def publish(source: str, target: str, sites: str, wait: bool, timeout: str, password_file: str, as_json: bool) -> None:
    """Rename the directory SRC to DST, of one mount, when the sites hold every body of it.

    Whoever looks, at whatever site, sees all of DST or nothing; and at these sites reads it from the own store. What a
    site lacks is copied there from here, unless its agent has done so. Close what is being written there first. DST
    must not exist. Failed or interrupted nothing is renamed, and the next run goes on.
    """
    from apollofs.blobstore import BlobStoreOptions
    from apollofs.fs.publish import PublishOptions, PublishProgress
    from apollofs.fs.publish import publish as publish_tree

    names = tuple(dict.fromkeys(filter(None, sites.split(","))))
    if not names:
        raise UserError("--sites names no site")
    place = mounted_directory(source, password_file)
    options = PublishOptions(names, parse_age(timeout) if wait else 0.0)
    stores = BlobStoreOptions(ca_file=places.blob_ca_file())
    before, after = _location(source, source), _location(target, source)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, highlight=False, markup=False)
    with Progress(*columns, console=console, disable=as_json or not sys.stderr.isatty()) as bar:
        task: TaskID = bar.add_task("publish", total=None)

        def tell(progress: PublishProgress) -> None:
            text = progress.trouble or ("copying" if progress.walk == 1 else "looking once more")
            total = max(progress.size_bytes * len(names), progress.copied_bytes)
            bar.update(task, description=text, completed=progress.copied_bytes, total=total)

        done = with_store(
            place.access,
            lambda store: publish_tree(
                store, place.access.url.volume, before, after, options, stores, places.version(), tell
            ),
        )
    if as_json:
        print_json({"files": done.files, "size_bytes": done.size_bytes, "copied_bytes": done.copied_bytes})
    else:
        click.echo(f"{target}: {done.files} files with bodies in stores, {size_text(done.copied_bytes)} copied")


def _location(path: str, source: str) -> tuple[int, bytes]:
    """The directory, by its inode, and the name of a path on the mount of `source`. Raises UserError."""
    head, name = os.path.split(absolute(path))
    entry, home = mount_of(os.path.realpath(head)), mount_of(os.path.realpath(source))
    if entry is None or home is None or entry.device != home.device:
        raise UserError(f"{path} is not on the mount of {source}")
    if absolute(path) == entry.mountpoint:
        raise UserError("the root of a volume can't be published, nor replaced")
    try:
        return os.stat(head).st_ino, os.fsencode(name)
    except OSError as exc:
        raise UserError(f"{head}: {exc.strerror}") from exc
