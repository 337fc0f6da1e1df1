"""`format`, `check` and `destroy`: the life of a volume, apart from any mount."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.checking import verify_data
from apollofs.fs.cli.errors import FAILED
from apollofs.fs.cli.output import json_option, print_json, print_pairs, size_text
from apollofs.fs.cli.places import blob_ca_file
from apollofs.fs.mount_options import parse_size
from apollofs.fs.user_error import UserError, leaves
from apollofs.metadata.records import SiteRecord
from apollofs.metadata.store import Store

VIOLATIONS_SHOWN_MAX = 10_000

blobs_option = click.option("--blobs", required=True, metavar="BLOB_URL", help="Where this site keeps bodies.")
create_option = click.option("--create-bucket", is_flag=True, help="Make the bucket or directory if it is missing.")


@click.command("format")
@meta_url_argument
@click.option("--site", required=True, metavar="NAME", help="Name of the first site.")
@blobs_option
@click.option("--block-size", default="4M", show_default=True, help="Bodies are kept in objects of this size.")
@click.option("--inline-max", default="8K", show_default=True, help="Bodies up to this size are kept in etcd.")
@create_option
@password_file_option
@json_option
def format_(
    meta_url: str,
    site: str,
    blobs: str,
    block_size: str,
    inline_max: str,
    create_bucket: bool,
    password_file: str,
    as_json: bool,
) -> None:
    """Make a volume, with its first site."""
    from apollofs.metadata.format import check_site_name, check_sizes, format_volume

    access = access_of(meta_url, password_file)
    block_bytes, inline_bytes = parse_size(block_size), parse_size(inline_max)
    check_sizes(block_bytes, inline_bytes)
    check_site_name(site)
    site_store = prepare_blobs(blobs, create=create_bucket)
    superblock = with_store(
        access,
        lambda store: format_volume(
            store,
            access.url.volume,
            site_name=site,
            site_store=site_store,
            block_bytes=block_bytes,
            inline_bytes_max=inline_bytes,
        ),
    )
    facts = {
        "volume": superblock.name,
        "uuid": superblock.uuid,
        "site": site,
        "blobs": blobs,
        "block_bytes": superblock.block_bytes,
        "inline_bytes_max": superblock.inline_bytes_max,
    }
    if as_json:
        print_json(facts)
    else:
        click.echo(f"volume {superblock.name!r} is formatted, with site {site!r}")


def prepare_blobs(blobs: str, *, create: bool) -> tuple[tuple[str, str], ...]:
    """Check that bodies can be kept there; the location as it is stored. Raises BadBlobURL, UserError."""
    import trio

    from apollofs.blobstore import (
        BlobStoreError,
        BlobStoreOptions,
        LocalLocation,
        parse_blob_url,
        prepare_blob_store,
    )

    location = parse_blob_url(blobs)
    # a directory that is there is as good as a bucket that is; only a missing one may be a disk that is not mounted
    create = create or (isinstance(location, LocalLocation) and os.path.isdir(location.directory))
    try:
        trio.run(prepare_blob_store, location, BlobStoreOptions(ca_file=blob_ca_file()), create)
    except BlobStoreError as exc:
        hint = "" if create else "; --create-bucket makes what is missing"
        raise UserError(f"the blob store {location.url()} can't be used: {exc}{hint}") from exc
    return tuple(location.to_dict().items())


@click.command()
@meta_url_argument
@click.argument("path", required=False)
@click.option("--data", is_flag=True, help="Read all file bodies at PATH (of the volume) and verify their checksums.")
@password_file_option
@json_option
def check(meta_url: str, path: str | None, data: bool, password_file: str, as_json: bool) -> int:
    """Walk the whole namespace and name every violated invariant; with --data read every block instead.

    The exit status is 1 if there is any. It changes nothing, and may run beside mounts.
    """
    access = access_of(meta_url, password_file)
    if data:
        return verify_data(access, path or "/", as_json=as_json)
    if path is not None:
        raise click.UsageError("PATH is for --data; without it the whole namespace is checked")
    from apollofs.metadata.check import CheckTotals, check_volume

    totals = CheckTotals()
    found: list[dict[str, object]] = []
    count = 0

    async def work(store: Store) -> None:
        nonlocal count
        async for violation in check_volume(store, access.url.volume, totals):
            count += 1
            if len(found) < VIOLATIONS_SHOWN_MAX:
                found.append({"table": violation.table, "ino": violation.ino, "message": violation.message})
            if not as_json and count <= VIOLATIONS_SHOWN_MAX:
                click.echo(f"{violation.table}  inode {violation.ino:#x}  {violation.message}")

    with_store(access, work)
    if as_json:
        print_json(
            {
                "volume": access.url.volume,
                "violations": found,
                "violation_count": count,
                "keys": totals.keys,
                "inodes": totals.inodes,
                "bytes": totals.bytes,
                "revision": totals.revision,
            }
        )
    else:
        verdict = "no violation" if not count else f"{count} violation{'s' if count > 1 else ''}"
        click.echo(f"{verdict} in {totals.inodes} inodes, {size_text(totals.bytes)}, {totals.keys} keys")
    return FAILED if count else 0


@click.command()
@meta_url_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--blobs", is_flag=True, help="Remove the bodies in all sites' stores too.")
@password_file_option
@json_option
def destroy(meta_url: str, yes: bool, blobs: bool, password_file: str, as_json: bool) -> None:
    """Remove a volume for good; refused while it is mounted anywhere.

    Nobody can mount it from the first moment on. Interrupted, or where a store failed, run it again to go on: bodies
    are removed before what tells where they are.
    """
    access = access_of(meta_url, password_file)
    volume = access.url.volume
    from apollofs.metadata.destroying import condemn_volume, remove_keys, sites_to_destroy

    async def work(store: Store) -> dict[str, object]:
        facts: dict[str, object] = {"volume": volume}
        if blobs:
            sites = await sites_to_destroy(store, volume)
            await _check_stores(sites)
            uuid = (await condemn_volume(store, volume)).uuid
            facts["objects_removed"] = await _remove_bodies(sites, uuid)
        else:
            await condemn_volume(store, volume)
        facts["keys_removed"] = await remove_keys(store, volume)
        return facts

    if not yes:
        # says that there is no such volume before it asks
        with_store(access, lambda store: sites_to_destroy(store, volume))
        if click.prompt(f"Type {volume} to remove it and all that is in it", default="") != volume:
            raise UserError("nothing was removed")
    facts = with_store(access, work)
    if as_json:
        print_json(facts)
    else:
        print_pairs({name.replace("_", " "): value for name, value in facts.items()})


async def _check_stores(sites: Sequence[SiteRecord]) -> None:
    """Before anything is removed. Raises UserError for the first store that can't be used."""
    from apollofs.blobstore import BlobStoreError, BlobStoreOptions, location_from_dict, prepare_blob_store

    for site in sites:
        location = location_from_dict(dict(site.store))
        try:
            await prepare_blob_store(location, BlobStoreOptions(ca_file=blob_ca_file()), create=False)
        except BlobStoreError as exc:
            raise UserError(
                f"the blob store of site {site.name!r} ({location.url()}) can't be used: {exc}; nothing was removed"
                " now; without --blobs the objects stay where they are, and only the rest goes"
            ) from exc


async def _remove_bodies(sites: Sequence[SiteRecord], uuid: str) -> int:
    """How many objects there were. Raises UserError where a store fails."""
    from apollofs.blobstore import BlobStoreError, BlobStoreOptions
    from apollofs.fs.site_stores import location_of, remove_objects

    removed = 0
    for site in sites:
        try:
            removed += await remove_objects(location_of(site, uuid), BlobStoreOptions(ca_file=blob_ca_file()))
        except (BlobStoreError, ExceptionGroup) as exc:
            failures = leaves(exc)
            if not all(isinstance(failure, BlobStoreError) for failure in failures):
                raise
            raise UserError(
                f"objects of site {site.name!r} could not be removed: {failures[0]}; run the command again to go on"
            ) from exc
    return removed
