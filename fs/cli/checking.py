"""`check --data`: what a verification of bodies prints."""

from __future__ import annotations

import os

import click

from apollofs.fs.check_data import DataCheck, DataTotals, Flaw
from apollofs.fs.cli.access import with_store
from apollofs.fs.cli.errors import FAILED
from apollofs.fs.cli.output import print_json, size_text
from apollofs.fs.cli.places import blob_ca_file
from apollofs.fs.meta_url import MetaAccess
from apollofs.metadata.name_text import name_text
from apollofs.metadata.store import Store

FLAWS_SHOWN_MAX = 10_000


def verify_data(access: MetaAccess, path: str, *, as_json: bool) -> int:
    """Read and verify all bodies at a path of the volume; the exit status."""
    from apollofs.blobstore import BlobStoreOptions
    from apollofs.fs.blobs import open_blob_source
    from apollofs.fs.site_stores import SiteStores, UnmountedVolume
    from apollofs.metadata.format import read_superblock
    from apollofs.metadata.keys import Keys
    from apollofs.metadata.tree import Tree

    flaws: list[Flaw] = []

    def found(flaw: Flaw) -> None:
        if len(flaws) < FLAWS_SHOWN_MAX:
            flaws.append(flaw)
            if not as_json:
                click.echo(f"{name_text(flaw.path)}: block {flaw.block} is {flaw.what}: {flaw.detail}")

    async def work(store: Store) -> DataTotals:
        superblock = await read_superblock(store, access.url.volume)
        stores = SiteStores(UnmountedVolume(store, superblock), BlobStoreOptions(ca_file=blob_ca_file()))
        async with open_blob_source(stores.open, superblock.block_bytes) as source:
            return await DataCheck(Tree(store, Keys(access.url.volume)), source, found).run(os.fsencode(path))

    totals = with_store(access, work)
    if as_json:
        print_json({"volume": access.url.volume, "path": path, **_facts(totals, flaws)})
    else:
        verdict = "every block is as it was written" if not totals.flaws else f"{totals.flaws} bad blocks"
        click.echo(f"{verdict}: {totals.files} files, {totals.blocks} blocks, {size_text(totals.bytes)} verified")
    return FAILED if totals.flaws else 0


def _facts(totals: DataTotals, flaws: list[Flaw]) -> dict[str, object]:
    return {
        "files": totals.files,
        "blocks": totals.blocks,
        "bytes": totals.bytes,
        "flaw_count": totals.flaws,
        "flaws": [
            {
                "path": name_text(flaw.path),
                "ino": flaw.ino,
                "blob": flaw.blob,
                "block": flaw.block,
                "what": flaw.what,
                "detail": flaw.detail,
            }
            for flaw in flaws
        ],
    }
