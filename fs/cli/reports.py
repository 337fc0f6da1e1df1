"""`mounts`, `status`, `info`, `version`: what is mounted where, how it is, and where a file's bytes are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, meta_url_argument, password_file_option, with_store
from apollofs.fs.cli.output import (
    age_text,
    json_option,
    print_json,
    print_pairs,
    print_table,
    size_text,
    time_text,
)
from apollofs.fs.control import MountSilent, ask, socket_path
from apollofs.fs.mountinfo import MountEntry, absolute, mount_of, read_mounts
from apollofs.fs.unmount_command import apollofs_mount_at
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

ASK_DEADLINE_S = 10.0
INFO_DEADLINE_S = 60.0


@click.command()
@meta_url_argument
@password_file_option
@json_option
def mounts(meta_url: str, password_file: str, as_json: bool) -> None:
    """Who has the volume mounted: each mount whose session lives."""
    from apollofs.metadata.format import list_mounts

    access = access_of(meta_url, password_file)
    records = with_store(access, lambda store: list_mounts(store, access.url.volume))
    found = [
        {
            "session": record.session,
            "host": record.host,
            "pid": record.pid,
            "mountpoint": record.mountpoint,
            "site": record.site,
            "version": record.version,
            "since_s": record.started_ns / 1e9,
            # its key is bound to the session's lease: a mount that is listed was heard of within its lease
            "alive": True,
        }
        for record in records
        if record.serves_files
    ]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["host"],
            one["mountpoint"],
            one["site"],
            one["pid"],
            one["session"],
            one["version"],
            age_text(time.time() - float(str(one["since_s"]))),
            "yes",
        )
        for one in found
    ]
    columns = ("host", "mountpoint", "site", "pid", "session", "version", "since", "alive")
    print_table(columns, rows, empty=f"volume {access.url.volume!r} is mounted nowhere")


@click.command()
@click.argument("mountpoint", required=False)
@json_option
def status(mountpoint: str | None, as_json: bool) -> None:
    """How a mount of this host is; without MOUNTPOINT: all of them."""
    if mountpoint is not None:
        facts = _asked(apollofs_mount_at(absolute(mountpoint)))
        print_json(facts) if as_json else _print_status(facts)
        return
    seen: dict[str, MountEntry] = {}
    for entry in read_mounts():
        if entry.is_apollofs:
            seen.setdefault(entry.device, entry)
    reports = []
    for entry in seen.values():
        try:
            reports.append({**_ask_status(entry), "answers": True})
        except UserError as exc:
            silent = {"mountpoint": entry.mountpoint, "volume": entry.volume, "answers": False, "problem": str(exc)}
            reports.append(silent)
    if as_json:
        print_json(reports)
        return
    rows = [
        (one["mountpoint"], one["volume"], one.get("site", "-"), one.get("pid", "-"), one.get("problem", "serves"))
        for one in reports
    ]
    print_table(("mountpoint", "volume", "site", "pid", "state"), rows, empty="no apollofs mount on this host")


def _ask_status(entry: MountEntry) -> dict[str, Any]:
    return ask(socket_path(places.runtime_dir(), entry.device), "status", deadline_s=ASK_DEADLINE_S)


def _asked(entry: MountEntry) -> dict[str, Any]:
    try:
        return _ask_status(entry)
    except MountSilent as exc:
        raise UserError(f"{entry.mountpoint}: {exc}") from exc


def _print_status(facts: Mapping[str, Any]) -> None:
    shown = {}
    for name, value in flattened(facts):
        label = name.removesuffix("_s").replace("_", " ")
        if name == "since_s":
            shown[label] = f"{time_text(value)} ({age_text(time.time() - value)})"
        elif name.endswith("_bytes"):
            shown[label.removesuffix(" bytes")] = size_text(value)
        elif isinstance(value, Mapping):
            shown[label] = ", ".join(_counter_text(inner, number) for inner, number in value.items()) or "-"
        elif isinstance(value, bool):
            shown[label] = "yes" if value else "no"
        else:
            shown[label] = str(value)
    print_pairs(shown)


def flattened(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Mappings in mappings become entries of their own, after the one that they are in."""
    for name, value in facts.items():
        if not isinstance(value, Mapping):
            yield name, value
            continue
        yield name, {inner: number for inner, number in value.items() if not isinstance(number, Mapping)}
        yield from ((inner, number) for inner, number in value.items() if isinstance(number, Mapping))


def _counter_text(name: str, value: float) -> str:
    text = name.removesuffix("_s").replace("_", " ")
    if isinstance(value, bool):
        return f"{text} {'yes' if value else 'no'}"
    return f"{text} {value} s" if name.endswith("_s") else f"{text} {value}"


@click.command()
@click.argument("path")
@json_option
def info(path: str, as_json: bool) -> None:
    """What a file is below the surface: inode, key, extents, blobs, sites."""
    path = absolute(path)
    entry = mount_of(os.path.realpath(path) if not os.path.islink(path) else path)
    if entry is None or not entry.is_apollofs:
        raise UserError(f"{path} is not on an apollofs mount")
    found = _asked_about(path, entry)
    if as_json:
        print_json({"path": path, **found})
        return
    extents = found.pop("extents")
    for name in ("mtime_ns", "ctime_ns", "btime_ns", "atime_ns"):
        found[name.removesuffix("_ns")] = time_text(found.pop(name) / 1e9)
    print_pairs({"path": path, **{name.replace("_", " "): value for name, value in found.items()}})
    if extents:
        columns = ("offset", "length", "blob", "blob offset", "blob length", "sites", "objects")
        rows = [
            (
                one["offset"],
                one["length"],
                one["blob"],
                one["blob_offset"],
                one["blob_length"],
                ",".join(one["sites"]),
                _objects_text(one["objects"]),
            )
            for one in extents
        ]
        print_table(columns, rows, empty="")


def _objects_text(objects: list[str]) -> str:
    return objects[0] + (f" and {len(objects) - 1} more" if len(objects) > 1 else "") if objects else "-"


def _asked_about(path: str, entry: MountEntry) -> dict[str, Any]:
    # The descriptor keeps the kernel from forgetting the inode while the mount is asked about it.
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror}") from exc
    try:
        ino = os.fstat(fd).st_ino
        is_root = path == entry.mountpoint
        parent = 0 if is_root else os.stat(os.path.dirname(path)).st_ino
        name = "" if is_root else name_text(os.fsencode(os.path.basename(path)))
        arguments = {"ino": ino, "parent": parent, "name": os.fsencode(os.path.basename(path)).hex()}
        found = ask(socket_path(places.runtime_dir(), entry.device), "info", arguments, deadline_s=INFO_DEADLINE_S)
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror}") from exc
    finally:
        os.close(fd)
    return {"name": name, **found}


@click.command()
@json_option
def version(as_json: bool) -> None:
    """The version of apollofs, and of what it runs on."""
    import platform

    facts = {"apollofs": places.version(), "python": platform.python_version(), "kernel": platform.release()}
    if as_json:
        print_json(facts)
    else:
        click.echo(" ".join(f"{name} {value}" for name, value in facts.items()))
