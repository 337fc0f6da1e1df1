"""`cache`, `warm`, `pin`, `unpin`: what of the files is on this node's disk.

The command walks the paths and asks the mount for a few files at a time, large ones part by part; so it can be ended at
any moment, and run again goes on where it was: what is here already is only verified.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from apollofs.fs.cli import places
from apollofs.fs.cli.output import json_option, print_json, print_pairs, size_text
from apollofs.fs.control import ask, socket_path
from apollofs.fs.mountinfo import MountEntry, absolute, mount_of, read_mounts
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

ASK_DEADLINE_S = 600.0
PARALLEL = 4
"""Requests at once; a mount answers a few more, and others ask it too."""
FILES_MAX = 32
PART_BYTES = 256 << 20
BATCH_BYTES = 64 << 20
FAILURES_SHOWN_MAX = 20


@click.group()
def cache() -> None:
    """What is cached on this node's disk: see it, drop it."""


@cache.command("status")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@json_option
def cache_status(paths: Sequence[str], as_json: bool) -> None:
    """How full the cache of each mount is; without PATH: of all mounts of this host."""
    reports = [
        {"mountpoint": entry.mountpoint, **_ask(entry, "cache", {})} for entry in _mounts_of([*map(absolute, paths)])
    ]
    if as_json:
        print_json(reports)
        return
    for report in reports:
        shown = {
            name.removesuffix("_bytes").replace("_", " "): size_text(value) if name.endswith("_bytes") else value
            for name, value in report.items()
        }
        print_pairs(shown)
    if not reports:
        click.echo("no apollofs mount on this host")


@cache.command("drop")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
def cache_drop(paths: Sequence[str]) -> int:
    """Delete what is cached of files and trees; without PATH: everything, of all mounts of this host.

    A mountpoint stands for all that its mount has cached. What is open or pinned stays. No data is lost: it is read
    from the store again.
    """
    listed = [absolute(path) for path in paths]
    whole = [entry for entry in _mounts_of(listed) if not listed or entry.mountpoint in listed]
    for entry in whole:
        _ask(entry, "drop", {})
    rest = [path for path in listed if path not in {entry.mountpoint for entry in whole}]
    return _Work("drop").run(rest) if rest else 0


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def warm(paths: Sequence[str]) -> int:
    """Fetch files and trees into this node's cache, before somebody waits for them."""
    return _Work("warm").run(paths)


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def pin(paths: Sequence[str]) -> int:
    """Fetch files and trees, and keep them in this node's cache until they are unpinned.

    A pin is of a file as it is now: pin it again after a change. Pins take at most 80 % of the cache.
    """
    return _Work("pin").run(paths)


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All pins of the mounts of these paths; without: of this host.")
def unpin(paths: Sequence[str], everything: bool) -> int:
    """Let the cache drop files and trees again when it needs the room.

    Pins of files that are gone go by themselves within a day; --all takes them back too.
    """
    if everything:
        entries = _mounts_of([*map(absolute, paths)])
        click.echo(f"unpin: {sum(_ask(entry, 'unpin', {})['files'] for entry in entries)} files", err=True)
        return 0
    if not paths:
        raise click.UsageError("say which files and trees, or --all")
    return _Work("unpin").run(paths)


def _mounts_of(paths: Sequence[str]) -> list[MountEntry]:
    """The apollofs mounts that paths lie on; of no paths: all that can be asked. Raises UserError."""
    if not paths:
        found = {entry.device: entry for entry in read_mounts() if entry.is_apollofs}
        return [entry for entry in found.values() if os.path.exists(socket_path(places.runtime_dir(), entry.device))]
    return list({(entry := _mount_of(path)).device: entry for path in paths}.values())


def _mount_of(path: str) -> MountEntry:
    entry = mount_of(os.path.realpath(path))
    if entry is None or not entry.is_apollofs:
        raise UserError(f"{path} is not on an apollofs mount")
    return entry


def _ask(entry: MountEntry, what: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return ask(socket_path(places.runtime_dir(), entry.device), what, arguments, deadline_s=ASK_DEADLINE_S)


@dataclass(frozen=True, slots=True)
class _Batch:
    """One request: some files, or a part of a large one."""

    entry: MountEntry
    paths: tuple[str, ...]
    size_bytes: int
    offset: int = 0
    whole: bool = True


class _Work:
    """One order for all files below some paths, several requests at once."""

    def __init__(self, order: str) -> None:
        self._order = order
        self._failed = 0
        self._done = 0
        self._lock = threading.Lock()
        self._console = Console(stderr=True, highlight=False, markup=False)

    def run(self, paths: Sequence[str]) -> int:
        """The exit status: 1 if anything failed, each with its line on standard error."""
        files = [(_mount_of(path), path) for path in map(absolute, paths)]
        columns = (TextColumn(self._order), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(self._order, total=None)
            with ThreadPoolExecutor(PARALLEL) as pool:
                running: set[Future[int]] = set()
                seen_bytes = 0
                for batch in self._batches(files):
                    seen_bytes += batch.size_bytes
                    progress.update(task, total=seen_bytes)
                    running.add(pool.submit(self._do, batch))
                    # the walk stays a few requests ahead of the work, so neither files nor memory pile up
                    if len(running) >= 2 * PARALLEL:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        progress.advance(task, sum(one.result() for one in finished))
                for one in running:
                    progress.advance(task, one.result())
        click.echo(
            f"{self._order}: {self._done} files" + (f", {self._failed} failed" if self._failed else ""), err=True
        )
        return 1 if self._failed else 0

    def _batches(self, roots: Sequence[tuple[MountEntry, str]]) -> Iterator[_Batch]:
        for entry, root in roots:
            gathered: list[str] = []
            size = 0
            for path, file_size in _files(root, self._complain):
                if self._order == "warm" and file_size > PART_BYTES:
                    for start in range(0, file_size, PART_BYTES):
                        yield _Batch(entry, (path,), min(PART_BYTES, file_size - start), start, whole=start == 0)
                    continue
                gathered.append(path)
                size += file_size
                if len(gathered) == FILES_MAX or size >= BATCH_BYTES:
                    yield _Batch(entry, tuple(gathered), size)
                    gathered, size = [], 0
            if gathered:
                yield _Batch(entry, tuple(gathered), size)

    def _do(self, batch: _Batch) -> int:
        """Ask for one batch. The descriptors keep the kernel from forgetting the inodes meanwhile."""
        opened: dict[int, tuple[int, str]] = {}
        try:
            for path in batch.paths:
                try:
                    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                except OSError as exc:
                    self._complain(path, str(exc.strerror))
                    continue
                opened[fd] = (os.fstat(fd).st_ino, path)
            arguments: dict[str, Any] = {"inos": [ino for ino, _ in opened.values()]}
            if self._order == "warm" and len(batch.paths) == 1:
                arguments |= {"offset": batch.offset, "length": max(batch.size_bytes, 1)}
            failed = _ask(batch.entry, self._order, arguments)["failed"]
            for ino, path in opened.values():
                if str(ino) in failed:
                    self._complain(path, failed[str(ino)])
                elif batch.whole:
                    with self._lock:
                        self._done += 1
        except UserError as exc:
            for path in batch.paths:
                self._complain(path, str(exc))
        finally:
            for fd in opened:
                os.close(fd)
        return batch.size_bytes

    def _complain(self, path: str, why: str) -> None:
        with self._lock:
            self._failed += 1
            if self._failed <= FAILURES_SHOWN_MAX:
                self._console.print(f"{name_text(os.fsencode(path))}: {why}", soft_wrap=True)


def _files(root: str, complain: Any) -> Iterator[tuple[str, int]]:
    """Every regular file at or below a path, on the same filesystem, with its size in bytes."""
    try:
        status = os.lstat(root)
        if stat.S_ISREG(status.st_mode):
            yield root, status.st_size
            return
        directories = [root] if stat.S_ISDIR(status.st_mode) else []
        device = status.st_dev
    except OSError as exc:
        complain(root, str(exc.strerror))
        return
    while directories:
        directory = directories.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield entry.path, found.st_size
                    elif stat.S_ISDIR(found.st_mode) and found.st_dev == device:
                        directories.append(entry.path)
        except OSError as exc:
            complain(directory, str(exc.strerror))
