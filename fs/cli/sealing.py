"""`seal`, `unseal`, `seals`: trees that nobody changes, so that every mount may keep them through a partition."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import click
from rich.console import Console
from rich.status import Status

from apollofs.fs.cli import places
from apollofs.fs.cli.access import access_of, password_file_option, with_store
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import age_text, json_option, print_json, print_table, time_text
from apollofs.fs.control import ask, socket_path
from apollofs.fs.meta_url import MetaAccess
from apollofs.fs.mountinfo import MountEntry, absolute, mount_of
from apollofs.fs.user_error import UserError
from apollofs.metadata.seal_records import Phase
from apollofs.metadata.sealing import SealProgress, Trusting

ASK_DEADLINE_S = 60.0
REPORT_EVERY_S = 0.5
NAMED_MAX = 3


@dataclass(frozen=True, slots=True)
class MountedDirectory:
    """A directory of a mount: what it is called in the volume, whoever has mounted that where."""

    access: MetaAccess
    ino: int


@click.command()
@click.argument("path")
@click.option("--term", default="1h", show_default=True, metavar="AGE", help="How long a mount trusts it unheard.")
@password_file_option
@json_option
def seal(path: str, term: str, password_file: str, as_json: bool) -> None:
    """Seal the directory PATH of a mount and all below it: nobody may change it, until it is unsealed.

    Every mount then caches it without asking, and a mount that is cut off still reads what it has cached, for one term.
    Close what is being written there first. Unsealing may take as long as the term. Interrupted, seal it again.
    """
    from apollofs.fs.sealed import SealedTrees

    place = mounted_directory(path, password_file)
    with _Shown(as_json=as_json) as shown:
        record = with_store(
            place.access,
            lambda store: SealedTrees(store, place.access.url.volume, places.version(), shown).seal(
                place.ino, parse_age(term)
            ),
        )
    if as_json:
        print_json({"seal": record.number, "path": record.path_text, "term_s": record.term_s, "marked": shown.inodes})
    else:
        click.echo(f"{record.path_text} is sealed, for a term of {age_text(record.term_s)}")


@click.command()
@click.argument("path")
@password_file_option
@json_option
def unseal(path: str, password_file: str, as_json: bool) -> None:
    """Let the sealed directory PATH of a mount, and all below it, be changed again.

    Waits until every mount has dropped what it has cached of it, or the term has passed for those that don't answer.
    Interrupted, unseal it again: the time that has passed counts.
    """
    from apollofs.fs.sealed import SealedTrees

    place = mounted_directory(path, password_file)
    with _Shown(as_json=as_json) as shown:
        record = with_store(
            place.access,
            lambda store: SealedTrees(store, place.access.url.volume, places.version(), shown).unseal(place.ino),
        )
    if as_json:
        print_json({"seal": record.number, "path": record.path_text, "cleared": shown.inodes})
    else:
        click.echo(f"{record.path_text} is not sealed any more")


@click.command()
@click.argument("place", metavar="PATH|META_URL")
@password_file_option
@json_option
def seals(place: str, password_file: str, as_json: bool) -> None:
    """The sealed trees of a volume, which a path on a mount of it stands for, too."""
    from apollofs.fs.sealed import SealedTrees

    access = access_of(place, password_file) if "://" in place else mounted_directory(place, password_file).access
    found = with_store(access, lambda store: SealedTrees(store, access.url.volume, places.version()).list())
    facts = [
        {
            "seal": one.record.number,
            "path": one.record.path_text,
            "term_s": one.record.term_s,
            "phase": one.record.phase.name.lower(),
            "since_s": one.record.since_ns / 1e9,
            "trusted_by": [who_text(each) for each in one.trusted_by],
        }
        for one in found
    ]
    if as_json:
        print_json(facts)
        return
    rows = [
        (
            one.record.number,
            one.record.path_text,
            age_text(one.record.term_s),
            one.record.phase.name.lower(),
            time_text(one.record.since_ns / 1e9),
            _names(one.trusted_by) or "-",
        )
        for one in found
    ]
    print_table(("seal", "path", "term", "phase", "since", "trusted by"), rows, empty="nothing is sealed")


def mounted_directory(path: str, password_file: str) -> MountedDirectory:
    """What PATH is below the surface; its mount has committed on return what was written before. Raises UserError."""
    entry = mount_of(os.path.realpath(path))
    if entry is None or not entry.is_apollofs:
        raise UserError(f"{absolute(path)} is not on an apollofs mount")
    if not os.path.isdir(path):
        raise UserError(f"{path} is no directory")
    ino = os.stat(path).st_ino
    _ask(entry, "sync")
    return MountedDirectory(access_of(str(_ask(entry, "status")["meta_url"]), password_file), ino)


def _ask(entry: MountEntry, what: str) -> dict[str, object]:
    return ask(socket_path(places.runtime_dir(), entry.device), what, deadline_s=ASK_DEADLINE_S)


def who_text(one: Trusting) -> str:
    """host:/mountpoint of who trusts a seal."""
    if one.mount is None:
        return f"session {one.session}, which has ended"
    return f"{one.mount.host}:{one.mount.mountpoint}"


def _names(trusting: list[Trusting]) -> str:
    more = f" and {len(trusting) - NAMED_MAX} more" if len(trusting) > NAMED_MAX else ""
    return ", ".join(map(who_text, trusting[:NAMED_MAX])) + more


class _Shown:
    """Says on a terminal how far it is; counts."""

    def __init__(self, *, as_json: bool) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        self._status: Status | None = None if as_json or not sys.stderr.isatty() else console.status("...")
        self._next = 0.0
        self.inodes = 0
        """Marked or cleared so far."""

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, progress: SealProgress) -> None:
        self.inodes = progress.inodes
        waits = progress.phase is Phase.ENDING
        if self._status is None or (time.monotonic() < self._next and not waits):
            return
        self._next = time.monotonic() + REPORT_EVERY_S
        self._status.update(_TEXTS[progress.phase](progress))


_TEXTS: dict[Phase, Callable[[SealProgress], str]] = {
    Phase.SEALING: lambda progress: f"sealing: {progress.inodes} files and directories",
    Phase.SEALED: lambda progress: "sealed",
    Phase.ENDING: lambda progress: f"waiting for {_names(progress.waits_for)}",
    Phase.OPENING: lambda progress: f"unsealing: {progress.inodes} files and directories",
}
