"""`site add|list|remove`: where a volume's bodies are kept."""

from __future__ import annotations

from typing import Any

import click

from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.output import json_option, print_json, print_table
from apollofs.fs.cli.volume import blobs_option, create_option, prepare_blobs
from apollofs.metadata.records import SiteRecord

site_option = click.option("--site", "name", required=True, metavar="NAME", help="Name of the site.")


@click.group()
def site() -> None:
    """Add, list and remove the sites of a volume."""


def facts_of(record: SiteRecord) -> dict[str, Any]:
    """A site for people and machines; its URL holds no credentials."""
    from apollofs.blobstore import location_from_dict

    return {"id": record.id, "name": record.name, "blobs": location_from_dict(dict(record.store)).url()}


@site.command()
@meta_url_argument
@site_option
@blobs_option
@create_option
@password_file_option
@json_option
def add(meta_url: str, name: str, blobs: str, create_bucket: bool, password_file: str, as_json: bool) -> None:
    """Give a volume one more site."""
    from apollofs.metadata.format import add_site, check_site_name, read_superblock

    access = access_of(meta_url, password_file)
    check_site_name(name)
    with_store(access, lambda store: read_superblock(store, access.url.volume))
    site_store = prepare_blobs(blobs, create=create_bucket)
    record = with_store(access, lambda store: add_site(store, access.url.volume, name, site_store))
    if as_json:
        print_json(facts_of(record))
    else:
        click.echo(f"volume {access.url.volume!r} has the site {name!r} now")


@site.command("list")
@meta_url_argument
@password_file_option
@json_option
def list_(meta_url: str, password_file: str, as_json: bool) -> None:
    """List the sites and where their bodies are."""
    from apollofs.metadata.format import list_sites

    access = access_of(meta_url, password_file)
    sites = [facts_of(record) for record in with_store(access, lambda store: list_sites(store, access.url.volume))]
    if as_json:
        print_json(sites)
    else:
        print_table(("id", "name", "blobs"), [tuple(one.values()) for one in sites], empty="no sites")


@site.command()
@meta_url_argument
@site_option
@password_file_option
@json_option
def remove(meta_url: str, name: str, password_file: str, as_json: bool) -> None:
    """Take a site away; refused while it is mounted or holds bodies."""
    from apollofs.metadata.format import remove_site

    access = access_of(meta_url, password_file)
    with_store(access, lambda store: remove_site(store, access.url.volume, name))
    if as_json:
        print_json({"volume": access.url.volume, "removed": name})
    else:
        click.echo(f"volume {access.url.volume!r} has no site {name!r} any more")
