"""`kv`: values of small files, read and replaced as a whole without a mount."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.output import json_option, print_json, print_table, size_text
from apollofs.fs.kv import Client, Entry, KeyEvent, KeyValues, Page
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text
from apollofs.metadata.store import NOW, Store

T = TypeVar("T")
LISTED_MAX = 100_000

site_option = click.option("--site", default="", metavar="NAME", help="Where a large value goes, if there are several.")
revision_option = click.option(
    "--if-revision", type=click.IntRange(0), metavar="N", help="Only if it is at this revision (0: not there)."
)


@click.group()
def kv() -> None:
    """Files as values: a PATH is that of a file in the volume, its directory exists."""


def with_client(
    meta_url: str, password_file: str, work: Callable[[Client], Awaitable[T]], *, site: str | None = None
) -> T:
    """Run `work` in a session of its own. `site` None: it stores nothing, and any will do."""
    from apollofs.fs.api import ClientOptions, client_of
    from apollofs.metadata.format import list_sites

    access = access_of(meta_url, password_file)
    # a command looks at nothing twice
    options = ClientOptions(blob_ca_file=places.blob_ca_file(), delegations=False, slots=4)

    async def run(store: Store) -> T:
        name = site
        if name is None:
            name = next((each.name for each in await list_sites(store, access.url.volume)), "")
        async with client_of(store, access, name, options) as client:
            return await work(client)

    return with_store(access, run)


async def _place(client: Client, path: str) -> tuple[KeyValues, bytes]:
    """The directory of a path, and the name in it. Raises UserError for a path that names no file."""
    head, _, name = os.fsencode(path).rpartition(b"/")
    if not name:
        raise UserError(f"{path!r} names no file")
    return await client.kv(head), name


@kv.command()
@meta_url_argument
@click.argument("path")
@click.option(
    "--at", default=0, type=click.IntRange(0), metavar="N", help="As it was at a revision that is still kept."
)
@password_file_option
@json_option
def get(meta_url: str, path: str, at: int, password_file: str, as_json: bool) -> None:
    """Write a value to standard output, byte for byte; with --json its revision, size and time instead."""

    async def work(client: Client) -> None:
        values, name = await _place(client, path)
        found = await values.get(name, revision=at)
        if as_json:
            facts = {"revision": found.revision, "size_bytes": len(found.data), "mtime_s": found.mtime_ns / 1e9}
            print_json({"path": _text(path), **facts})
        else:
            sys.stdout.buffer.write(found.data)
            sys.stdout.buffer.flush()

    with_client(meta_url, password_file, work)


@kv.command()
@meta_url_argument
@click.argument("path")
@click.argument("value", default="-")
@revision_option
@site_option
@password_file_option
@json_option
def put(
    meta_url: str, path: str, value: str, if_revision: int | None, site: str, password_file: str, as_json: bool
) -> None:
    """Make VALUE, or what standard input holds, the value of a file, and say its revision."""
    data = sys.stdin.buffer.read() if value == "-" else os.fsencode(value)

    async def work(client: Client) -> int:
        values, name = await _place(client, path)
        return await values.transaction([values.change(name, data, revision=if_revision)])

    revision = with_client(meta_url, password_file, work, site=site)
    if as_json:
        print_json({"path": _text(path), "revision": revision, "size_bytes": len(data)})
    else:
        click.echo(revision)


@kv.command()
@meta_url_argument
@click.argument("path")
@revision_option
@password_file_option
def rm(meta_url: str, path: str, if_revision: int | None, password_file: str) -> None:
    """Remove a value."""

    async def work(client: Client) -> bool:
        values, name = await _place(client, path)
        return await values.delete(name, revision=if_revision)

    if not with_client(meta_url, password_file, work) and if_revision is None:
        raise UserError(f"there is no {path!r}")


@kv.command()
@meta_url_argument
@click.argument("directory", default="/")
@click.option("--prefix", default="", help="Only names that begin with it.")
@click.option("--after", default="", metavar="KEY", help="Only names behind it, in byte order.")
@password_file_option
@json_option
def ls(meta_url: str, directory: str, prefix: str, after: str, password_file: str, as_json: bool) -> None:
    """List the values of a directory, as of one revision: up to 100,000 names, and whether there are more."""

    async def work(client: Client) -> tuple[list[Entry], Page]:
        values = await client.kv(directory)
        page = await values.list(prefix, after=after)
        found = list(page.entries)
        while page.after is not None and len(found) < LISTED_MAX:
            page = await values.list(prefix, after=page.after, revision=page.revision)
            found += page.entries
        return found, page

    entries, page = with_client(meta_url, password_file, work)
    last = None if page.after is None else _text(page.after)
    if as_json:
        listed = [{"key": _text(e.key), "revision": e.revision, "size_bytes": e.size_bytes} for e in entries]
        print_json({"directory": _text(directory), "revision": page.revision, "entries": listed, "after": last})
        return
    rows = [
        (_text(e.key), "-" if e.size_bytes is None else size_text(e.size_bytes), e.revision or "-") for e in entries
    ]
    print_table(("key", "size", "revision"), rows, empty="no values")
    if last is not None:
        click.echo(f"there are more: --after {last}")


@kv.command()
@meta_url_argument
@click.argument("directory", default="/")
@click.option("--prefix", default="", help="Only names that begin with it.")
@click.option("--from", "start", default=NOW, type=click.IntRange(0), metavar="N", help="From a revision on; else now.")
@click.option("--count", default=0, type=click.IntRange(0), metavar="N", help="End after so many changes.")
@password_file_option
@json_option
def watch(
    meta_url: str, directory: str, prefix: str, start: int, count: int, password_file: str, as_json: bool
) -> None:
    """Tell what becomes of the values of a directory, one change a line, until interrupted.

    With --json each line is an object; its `position` is where --from goes on. (Its revision plus one would leave out
    the other keys of the same transaction.)
    """

    async def work(client: Client) -> None:
        values = await client.kv(directory)
        told = 0
        async with values.watch(prefix, from_revision=start) as events:
            async for event in events:
                _tell(event, events.position, as_json=as_json)
                told += 1
                if told == count:
                    return

    with_client(meta_url, password_file, work)


def _tell(event: KeyEvent, position: int, *, as_json: bool) -> None:
    """`position`: where a watch goes on behind it."""
    key = _text(event.key)
    if as_json:
        import json

        facts = {"revision": event.revision, "key": key, "deleted": event.deleted, "size_bytes": event.size_bytes}
        click.echo(json.dumps({**facts, "position": position}, ensure_ascii=False))
    else:
        click.echo(f"{event.revision}  {'removed' if event.deleted else 'put'}  {key}")
    sys.stdout.flush()


def _text(name: str) -> str:
    """A key or a path, which may be any bytes, as text that can be printed."""
    return name_text(os.fsencode(name))
