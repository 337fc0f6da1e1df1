"""What commands share that talk to etcd: the META_URL argument, the password, and one run with a connected store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import click

from apollofs.fs.cli.places import etcd_password
from apollofs.fs.meta_url import MetaAccess, parse_meta_url, resolve_password
from apollofs.metadata.store import Store

T = TypeVar("T")

meta_url_argument = click.argument("meta_url", metavar="META_URL")
path_argument = click.argument("path")
password_file_option = click.option(
    "--password-file", default="", metavar="FILE", help="The etcd user's password; else APOLLOFS_ETCD_PASSWORD."
)


def access_of(meta_url: str, password_file: str = "") -> MetaAccess:
    """Parse the URL and find the password. Raises UserError."""
    return resolve_password(parse_meta_url(meta_url), etcd_password(), password_file)


def with_store(access: MetaAccess, work: Callable[[Store], Awaitable[T]]) -> T:
    """Connect, run `work`, close. Raises UserError that names the servers where they can't be used."""
    import trio

    from apollofs.fs.connect import connected_store, explained

    async def run() -> T:
        async with connected_store(access) as store:
            return await work(store)

    with explained(access.url):
        return trio.run(run)
