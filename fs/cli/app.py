"""The root command, and the way every command ends: one line on standard error, and a status."""

from __future__ import annotations

import importlib
import io
import sys
import traceback
from collections.abc import Sequence

import click

from apollofs.fs.cli.errors import USAGE, describe, status_of

COMMANDS = {
    "format": ("volume", "format_"),
    "check": ("volume", "check"),
    "clone": ("cloning", "clone"),
    "destroy": ("volume", "destroy"),
    "gc": ("collecting", "gc"),
    "changes": ("changes", "changes"),
    "trash": ("trash", "trash"),
    "publish": ("publish", "publish"),
    "seal": ("sealing", "seal"),
    "unseal": ("sealing", "unseal"),
    "seals": ("sealing", "seals"),
    "kv": ("kv", "kv"),
    "site": ("site", "site"),
    "policy": ("policy", "policy"),
    "retention": ("retention", "retention"),
    "agent": ("agent", "agent"),
    "mount": ("mounting", "mount"),
    "umount": ("mounting", "umount"),
    "mounts": ("reports", "mounts"),
    "status": ("reports", "status"),
    "info": ("reports", "info"),
    "cache": ("caching", "cache"),
    "warm": ("caching", "warm"),
    "pin": ("caching", "pin"),
    "unpin": ("caching", "unpin"),
    "up": ("embedded", "up"),
    "down": ("embedded", "down"),
    "staging": ("staging", "staging"),
    "plan": ("plan", "plan"),
    "install-mount-helper": ("helper", "install_mount_helper"),
    "mount-helper": ("helper", "mount_helper"),
    "umount-helper": ("helper", "umount_helper"),
    "version": ("reports", "version"),
}
"""Name of a command -> module below this package, and object in it."""
HIDDEN = ("mount-helper", "umount-helper")


class LazyGroup(click.Group):
    """Imports the module of a command when that command is used: `apollofs mount` must not wait for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if name not in HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"apollofs.fs.cli.{module}"), attribute)
        return command


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks, and log more.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """apollofs: one POSIX namespace over etcd and S3.

    META_URL is etcd://[user@]host:2379,host2:2379/volume (etcds:// with TLS; ?ca=, cert=, key=, password-file= name
    files). BLOB_URL is s3://bucket/prefix[?endpoint=URL&region=NAME] or file:///directory. Passwords come from
    APOLLOFS_ETCD_PASSWORD or a file; S3 credentials from the usual AWS places.
    """
    ctx.obj = debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Whatever goes wrong is one line on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _print_any_name()
    try:
        result = cli.main(words, prog_name="apollofs", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return USAGE
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as exc:  # noqa: BLE001  (all are told in one line)
        if "--debug" in words:
            traceback.print_exception(exc)
        click.echo(f"apollofs: {describe(exc)}", err=True)
        return status_of(exc)
    return result if isinstance(result, int) else 0


def _print_any_name() -> None:
    """Names are any bytes: what the terminal's encoding does not have is printed as \\x.., and is no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
