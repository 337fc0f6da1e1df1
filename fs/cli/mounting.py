"""`mount` and `umount`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option
from apollofs.fs.cli.errors import describe, is_bug
from apollofs.fs.cli.output import json_option, print_json
from apollofs.fs.config import BodyConfig, SessionConfig, default_deadline_s
from apollofs.fs.daemon import ForegroundReadiness, NotifyReadiness, PipeReadiness, Readiness, start_detached
from apollofs.fs.log import start_logging
from apollofs.fs.mount_checks import check_cache_dir, check_fuse_device, check_mountpoint
from apollofs.fs.mount_config import MountConfig
from apollofs.fs.mount_options import MountOptions, parse_address, parse_options, parse_size
from apollofs.fs.mountinfo import absolute
from apollofs.fs.user_error import UserError

log = logging.getLogger(__name__)

START_GRACE_S = 20.0
"""How much longer the command waits than the daemon gives itself."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What the command line asks for, before anything is looked at."""

    meta_url: str
    mountpoint: str
    options: MountOptions
    site: str = ""
    cache_dir: str = ""
    password_file: str = ""
    log_file: str = ""
    foreground: bool = False
    debug: bool = False

    def choice(self, explicit: str, option: str, hint: str = "") -> str:
        """An option of the command, or else of -o. Raises UserError with `hint` where it is needed and missing."""
        value = explicit or self.options.values.get(option, "")
        if not value and hint:
            raise click.UsageError(hint)
        return value


@click.command()
@meta_url_argument
@click.argument("mountpoint")
@click.option("--site", default="", metavar="NAME", help="The site whose store takes what is written here.")
@click.option("--cache-dir", default="", metavar="DIR", help="Local disk for cached and staged bodies.")
@click.option("--cache-size", default="", metavar="SIZE", help="Bound of the cache; 10G unless given.")
@click.option("--lease-ttl", default="", metavar="SECONDS", help="Silence after which the mount has lost its session.")
@click.option("-o", "options", multiple=True, metavar="OPT,...", help="Mount options, also any of these as name=value.")
@click.option("--ro", is_flag=True, help="Read only.")
@click.option("--allow-other/--no-allow-other", default=None, help="Let other users in; root's mounts do.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to standard error.")
@click.option("--log-file", default="", metavar="FILE", help="Log of the background process.")
@password_file_option
@json_option
@click.pass_context
def mount(ctx: click.Context, /, meta_url: str, mountpoint: str, options: tuple[str, ...], **given: Any) -> None:
    """Mount a volume; returns when the mount answers."""
    texts = [*options]
    texts += [f"{name}={given[name]}" for name in ("cache_size", "lease_ttl") if given[name]]
    texts += ["ro"] if given["ro"] else []
    if given["allow_other"] is not None:
        texts.append("allow_other" if given["allow_other"] else "noallow_other")
    parsed = parse_options(texts)
    request = MountRequest(
        meta_url=meta_url,
        mountpoint=mountpoint,
        options=parsed,
        site=given["site"],
        cache_dir=given["cache_dir"],
        password_file=given["password_file"],
        log_file=given["log_file"],
        foreground=given["foreground"],
        debug=bool(ctx.obj) or "debug" in parsed.flags,
    )
    facts = run_mount(request)
    if given["as_json"] and facts is not None:
        print_json(facts)


def run_mount(request: MountRequest) -> dict[str, Any] | None:
    """Mount as asked: returns when the mount answers, with what it says of itself; None after a foreground mount."""
    config = config_of(request)
    log_file = request.choice(request.log_file, "log_file")
    if request.foreground:
        start_logging(os.path.abspath(log_file) if log_file else None, debug=request.debug)
        socket = places.notify_socket()
        serve(config, NotifyReadiness(socket) if socket else ForegroundReadiness())
        return None
    path = os.path.abspath(log_file or places.log_path(config.mountpoint))

    def daemon(readiness: PipeReadiness) -> int:
        start_logging(path, debug=request.debug)
        try:
            return serve(config, readiness)
        except (Exception, BaseExceptionGroup) as exc:
            log.error("%s: %s", config.mountpoint, describe(exc), exc_info=exc if is_bug(exc) else None)
            raise

    deadline_s = config.start_deadline_s + START_GRACE_S
    facts = start_detached(daemon, log_path=path, deadline_s=deadline_s, describe=describe)
    return {**facts, "volume": config.access.url.volume, "site": config.site, "log_file": path}


def serve(config: MountConfig, readiness: Readiness) -> int:
    """Run the mount to its end, in this process. Libraries that start threads are imported here, after the fork."""
    import trio

    from apollofs.fs.allocator import keep_buffers
    from apollofs.fs.connect import explained
    from apollofs.fs.mount import serve_mount

    keep_buffers()
    with explained(config.access.url):
        trio.run(serve_mount, config, readiness)
    return 0


def config_of(request: MountRequest) -> MountConfig:
    """Check everything that this host can tell, in the order in which a person would ask. Raises UserError."""
    values = request.options.values
    site = request.choice(request.site, "site", "--site NAME (or -o site=NAME) is needed")
    cache_dir = request.choice(request.cache_dir, "cache_dir", "--cache-dir DIR (or -o cache_dir=DIR) is needed")
    access = access_of(request.meta_url, request.choice(request.password_file, "password_file"))
    body = _given(
        values,
        cache_size=("cache_bytes_max", parse_size),
        uploads=("uploads_max", whole_number),
        downloads=("downloads_max", whole_number),
        commit_interval=("commit_interval_s", number),
        commit_deadline=("commit_deadline_s", number),
        read_deadline=("read_deadline_s", number),
        passthrough=("passthrough", switch),
    )
    session = _given(
        values,
        lease_ttl=("lease_ttl_s", whole_number),
        operation_deadline=("operation_deadline_s", number),
        delegations=("delegations", switch),
        entry_cache=("entry_cache", switch),
        write_back=("write_back", switch),
    )
    flags = request.options.flags
    body_config = BodyConfig(cache_dir=Path(os.path.abspath(cache_dir)), **body)
    if "lease_ttl_s" in session:
        session.setdefault("operation_deadline_s", default_deadline_s(session["lease_ttl_s"]))
    session_config = SessionConfig(**session)
    check_fuse_device()
    mountpoint = check_mountpoint(request.mountpoint)
    check_cache_dir(cache_dir)
    return MountConfig(
        access=access,
        mountpoint=mountpoint,
        site=site,
        body=body_config,
        session=session_config,
        runtime_dir=places.runtime_dir(),
        read_only="ro" in flags,
        guard="guard" in flags,
        allow_other="allow_other" in flags or (os.geteuid() == 0 and "noallow_other" not in flags),
        kernel_options=request.options.kernel,
        **_given(values, metrics=("metrics", parse_address)),
        version=places.version(),
        blob_ca_file=places.blob_ca_file(),
        stop_deadline_s=body_config.commit_deadline_s + 30,
    )


def _given(values: Mapping[str, str], **known: tuple[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Those of the options that were given, converted, under the names of the configuration's fields."""
    converted = {}
    for option, (name, convert) in known.items():
        if option in values:
            try:
                converted[name] = convert(values[option])
            except UserError as exc:
                raise UserError(f"option {option!r}: {exc}") from exc
    return converted


def whole_number(text: str) -> int:
    """Raises UserError."""
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{text!r} is no whole number")
    return int(text)


def switch(text: str) -> bool:
    """Raises UserError."""
    if text not in ("on", "off"):
        raise UserError(f"{text!r} is neither on nor off")
    return text == "on"


def number(text: str) -> float:
    """Raises UserError."""
    try:
        value = float(text)
    except ValueError as exc:
        raise UserError(f"{text!r} is no number") from exc
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{text!r} is no number")
    return value


@click.command()
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="Take it out of the tree now, even if it is busy or does not answer.")
@json_option
def umount(mountpoint: str, lazy: bool, as_json: bool) -> None:
    """Unmount; returns when all that was written is committed, or fails and leaves it mounted."""
    from apollofs.fs.unmount_command import unmount_and_wait

    facts = unmount_and_wait(absolute(mountpoint), places.runtime_dir(), lazy=lazy)
    if as_json:
        print_json(facts)
