"""What mount(8), umount(8) and systemd call, and the command that puts it in its place."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click

from apollofs.fs.cli.errors import describe
from apollofs.fs.cli.mounting import MountRequest, run_mount
from apollofs.fs.cli.output import json_option, print_json
from apollofs.fs.mount_options import parse_options
from apollofs.fs.user_error import UserError

MOUNT_FAILED = 32
"""What mount(8) and umount(8) expect of a helper that could not do its work."""
MARK = "# Installed by `apollofs install-mount-helper`."
SYSTEMD_UNIT = "apollofs@.service"


@dataclass(frozen=True, slots=True)
class HelperCall:
    """`mount.apollofs SOURCE TARGET [-sfnv] [-N namespace] [-o opts] [-t type]`, parsed."""

    places: tuple[str, ...]
    options: tuple[str, ...] = ()
    fake: bool = False
    lazy: bool = False


def parse_helper_call(words: list[str]) -> HelperCall:
    """Parse what mount(8) and umount(8) pass. Raises click.UsageError for what is not in their convention."""
    placed: list[str] = []
    options: list[str] = []
    letters: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            placed.append(word)
            continue
        for index, letter in enumerate(word[1:], start=1):
            if letter in "oNt":
                value = word[index + 1 :] or (rest.pop(0) if rest else "")
                if letter == "N":
                    raise UserError("mounting into another namespace (-N) is not supported")
                options += [value] if letter == "o" else []
                break
            if letter not in "sfnvlrw":
                raise click.UsageError(f"unknown option -{letter}")
            letters.add(letter)
    if "r" in letters:
        options.append("ro")
    return HelperCall(tuple(placed), tuple(options), fake="f" in letters, lazy="l" in letters)


helper_settings = {"ignore_unknown_options": True, "help_option_names": []}


@click.command("mount-helper", hidden=True, context_settings=helper_settings)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def mount_helper(ctx: click.Context, words: tuple[str, ...]) -> int:
    """mount.apollofs: what `mount -t apollofs` runs."""
    try:
        call = parse_helper_call(list(words))
        if len(call.places) != 2:
            raise click.UsageError("mount.apollofs SOURCE TARGET [-sfnv] [-o OPTIONS]")
        source, target = call.places
        options = parse_options(call.options)
        request = MountRequest(meta_url=source, mountpoint=target, options=options, debug=bool(ctx.obj))
        if not call.fake:
            run_mount(request)
    except Exception as exc:  # noqa: BLE001  (all are told in one line)
        return _failed("mount.apollofs", exc, debug=bool(ctx.obj))
    return 0


@click.command("umount-helper", hidden=True, context_settings=helper_settings)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def umount_helper(ctx: click.Context, words: tuple[str, ...]) -> int:
    """umount.fuse.apollofs: makes `umount` wait until all that was written is committed."""
    from apollofs.fs.cli import places
    from apollofs.fs.mountinfo import absolute
    from apollofs.fs.unmount_command import unmount_and_wait

    try:
        call = parse_helper_call(list(words))
        if len(call.places) != 1:
            raise click.UsageError("umount.fuse.apollofs MOUNTPOINT [-flnrv]")
        # umount's -f means what mount's does not: get rid of it even if it does not answer
        unmount_and_wait(absolute(call.places[0]), places.runtime_dir(), lazy=call.lazy or call.fake)
    except Exception as exc:  # noqa: BLE001  (all are told in one line)
        return _failed("umount.apollofs", exc, debug=bool(ctx.obj))
    return 0


def _failed(program: str, exc: Exception, *, debug: bool) -> int:
    if debug:
        raise exc
    click.echo(f"{program}: {describe(exc)}", err=True)
    return 1 if isinstance(exc, click.UsageError) else MOUNT_FAILED


# -- putting them in their place -------------------------------------------------------------------------------------


@click.command("install-mount-helper")
@click.option("--uninstall", is_flag=True, help="Remove what was installed.")
@click.option("--sbin", default="/sbin", show_default=True, metavar="DIR", help="Where mount(8) looks for helpers.")
@click.option("--systemd", default="/etc/systemd/system", show_default=True, metavar="DIR", help="Where units are.")
@click.option("--no-unit", is_flag=True, help="Do not install the systemd unit; /etc/fstab needs none.")
@json_option
def install_mount_helper(uninstall: bool, sbin: str, systemd: str, no_unit: bool, as_json: bool) -> None:
    """Make `mount -t apollofs`, /etc/fstab and a systemd unit work on this host."""
    files = helper_files(Path(sbin))
    if not no_unit and (Path(systemd).is_dir() or uninstall):
        files[Path(systemd, SYSTEMD_UNIT)] = (unit_text(), 0o644)
    touched = [str(path) for path, (text, mode) in files.items() if _apply(path, text, mode, remove=uninstall)]
    if as_json:
        print_json({"removed" if uninstall else "installed": touched})
        return
    for path in touched:
        click.echo(f"{'removed' if uninstall else 'installed'} {path}")
    if not uninstall:
        click.echo(
            textwrap.dedent("""
            A line for /etc/fstab:
              etcd://host1:2379/volume  /mnt/volume  apollofs  site=NAME,cache_dir=/var/cache/apollofs,_netdev  0 0
            Or with systemd: /etc/apollofs/NAME.conf with META_URL=, MOUNTPOINT=, SITE=, CACHE_DIR=, OPTIONS=, then
              systemctl enable --now apollofs@NAME""").strip()
        )


def helper_files(sbin: Path) -> dict[Path, tuple[str, int]]:
    """Path -> (content, mode) of the helpers of mount(8) and umount(8)."""
    program = shlex.join([sys.executable, "-m", "apollofs.fs.cli"])

    def script(command: str) -> tuple[str, int]:
        return f'#!/bin/sh\n{MARK}\nexec {program} {command} "$@"\n', 0o755

    return {
        sbin / "mount.apollofs": script("mount-helper"),
        sbin / "mount.fuse.apollofs": script("mount-helper"),
        sbin / "umount.apollofs": script("umount-helper"),
        sbin / "umount.fuse.apollofs": script("umount-helper"),
    }


def unit_text() -> str:
    """The template unit: one instance for each file in /etc/apollofs."""
    program = shlex.join([sys.executable, "-m", "apollofs.fs.cli"])
    return textwrap.dedent(f"""\
        {MARK}
        [Unit]
        Description=apollofs mount %i
        Documentation=man:mount(8)
        Wants=network-online.target
        After=network-online.target etcd.service
        Before=remote-fs.target

        [Service]
        Type=notify
        NotifyAccess=main
        EnvironmentFile=/etc/apollofs/%i.conf
        ExecStart={program} mount ${{META_URL}} ${{MOUNTPOINT}} --foreground \\
            --site ${{SITE}} --cache-dir ${{CACHE_DIR}} -o defaults,${{OPTIONS}}
        ExecStop={program} umount ${{MOUNTPOINT}}
        TimeoutStartSec=60
        TimeoutStopSec=300
        Restart=on-failure
        RestartSec=2
        KillMode=mixed
        LimitNOFILE=1048576

        [Install]
        WantedBy=multi-user.target
        """)


def _apply(path: Path, text: str, mode: int, *, remove: bool) -> bool:
    """Write or remove one file; whether anything was done. Never touches a file that is not ours."""
    try:
        if path.exists() and MARK not in path.read_text(errors="replace"):
            raise UserError(f"{path} exists and is not of apollofs: remove it first")
        if remove:
            existed = path.exists()
            path.unlink(missing_ok=True)
            return existed
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text)
        fresh.chmod(mode)
        shutil.move(fresh, path)
    except OSError as exc:
        hint = " (are you root?)" if os.geteuid() else ""
        raise UserError(f"{path} can't be {'removed' if remove else 'written'}: {exc.strerror}{hint}") from exc
    return True
