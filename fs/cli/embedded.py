"""`up` and `down`: a volume that needs no servers, in a directory of one's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, with_store
from apollofs.fs.cli.output import json_option, print_json
from apollofs.fs.cli.volume import prepare_blobs
from apollofs.fs.embedded import HOST, EmbeddedEtcd, EmbeddedState
from apollofs.fs.embedded_auth import PASSWORD_FILE, USER, close_to_others
from apollofs.fs.meta_url import MetaAccess
from apollofs.fs.mount_checks import check_fuse_device, check_mountpoint
from apollofs.fs.mount_options import parse_options
from apollofs.fs.mountinfo import absolute, mount_at
from apollofs.fs.unmount_command import unmount_and_wait
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import AlreadyFormatted, NotFormatted
from apollofs.metadata.store import Store

SITE_DEFAULT = "local"


@click.command()
@click.argument("directory")
@click.argument("mountpoint")
@click.option("--site", default=SITE_DEFAULT, show_default=True, metavar="NAME", help="Made if it is missing.")
@click.option("--cache-size", default="", metavar="SIZE", help="Bound of the cache; 10G unless given.")
@click.option("-o", "options", multiple=True, metavar="OPT,...", help="Mount options.")
@json_option
def up(directory: str, mountpoint: str, site: str, cache_size: str, options: tuple[str, ...], as_json: bool) -> None:
    """Mount a private volume that is kept below DIRECTORY: an etcd of its own, and bodies in plain files.

    Run again, it brings the same data back. With another --site and MOUNTPOINT it is one more mount of the volume.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", site):
        raise UserError(f"bad site name {site!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    texts = [*options, *([f"cache_size={cache_size}"] if cache_size else [])]
    parse_options(texts)
    check_fuse_device()
    check_mountpoint(mountpoint)
    server = EmbeddedEtcd(directory, places.environment())
    with server.locked():
        state = server.start()
        close_to_others(HOST, state.client_port, server.directory)
        access = _access(state, server.directory)
        _have_site(access, server.directory, site)
        facts = _mount(access, server.directory, mountpoint, site, texts)
    report = {**facts, "meta_url": str(access.url), "directory": server.directory}
    if as_json:
        print_json(report)
    else:
        click.echo(f"{report['mountpoint']} is mounted; its volume is {access.url}")


def _mount(access: MetaAccess, directory: str, mountpoint: str, site: str, options: list[str]) -> dict[str, Any]:
    """`apollofs mount`, as a process of its own: this one has talked to etcd, and its threads survive no fork."""
    places_below = {"--cache-dir": os.path.join(directory, "cache", site), "--log-file": f"{directory}/log/{site}.log"}
    words = [sys.executable, "-m", "apollofs.fs.cli", "mount", str(access.url), mountpoint, "--site", site, "--json"]
    words += [word for pair in places_below.items() for word in pair]
    words += [word for text in options for word in ("-o", text)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(done.stderr.strip().removeprefix("apollofs: ") or f"mount ended with status {done.returncode}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _access(state: EmbeddedState, directory: str) -> MetaAccess:
    password_file = quote(os.path.join(directory, PASSWORD_FILE))
    return access_of(f"etcd://{USER}@{HOST}:{state.client_port}/{state.volume}?password-file={password_file}")


def _have_site(access: MetaAccess, directory: str, site: str) -> None:
    """Format the volume with the site, or add the site to it, unless that was done before."""
    from apollofs.metadata.format import add_site, format_volume, list_sites

    volume = access.url.volume

    async def names(store: Store) -> set[str] | None:
        try:
            return {record.name for record in await list_sites(store, volume)}
        except NotFormatted:
            return None

    known = with_store(access, names)
    if known is not None and site in known:
        return
    blobs = os.path.join(directory, "blobs", site)
    os.makedirs(blobs, mode=0o700, exist_ok=True)
    site_store = prepare_blobs(f"file://{quote(blobs)}", create=True)

    async def make(store: Store) -> None:
        if known is None:
            await format_volume(
                store, volume, site_name=site, site_store=site_store, uid=os.geteuid(), gid=os.getegid()
            )
        else:
            await add_site(store, volume, site, site_store)

    try:
        with_store(access, make)
    except AlreadyFormatted as exc:
        raise UserError(f"{directory} was brought up by another command at the same time: try again") from exc


@click.command()
@click.argument("directory")
@click.option("--lazy", is_flag=True, help="Detach mounts that are busy.")
@json_option
def down(directory: str, lazy: bool, as_json: bool) -> None:
    """Unmount everything that DIRECTORY keeps, and end its etcd; the data stays."""
    server = EmbeddedEtcd(directory, places.environment())
    if not os.path.isdir(server.directory):
        raise UserError(f"{server.directory} does not exist")
    with server.locked():
        state = server.state()
        if state is None and not server.has_data():
            raise UserError(f"{server.directory} was never brought up")
        # without a state it was interrupted before anything could be mounted
        unmounted = []
        if state is not None and server.running_pid() is not None:
            unmounted = _unmount_all(_access(state, server.directory), lazy=lazy)
        stopped = server.stop()
    report = {"directory": server.directory, "unmounted": unmounted, "etcd_stopped": stopped}
    if as_json:
        print_json(report)
    else:
        click.echo(f"{server.directory} is down" if stopped else f"{server.directory} was down already")


def _unmount_all(access: MetaAccess, *, lazy: bool) -> list[str]:
    """The etcd listens on loopback only, so every mount of it is on this host."""
    from apollofs.metadata.format import list_mounts

    try:
        records = with_store(access, lambda store: list_mounts(store, access.url.volume))
    except NotFormatted:
        return []
    done = []
    for record in records:
        entry = mount_at(absolute(record.mountpoint))
        if entry is not None and entry.is_apollofs and entry.volume == access.url.volume:
            unmount_and_wait(entry.mountpoint, places.runtime_dir(), lazy=lazy)
            done.append(entry.mountpoint)
    return done
