"""The quickstart: one namespace mounted as two sites, a checkpoint saved on one mount and verified on the other.

Run by scripts/quickstart with the Python of .venv.  It drives the command `apollofs` as a person would, and shows each
command before it runs it.  Layout under the directory apollofs-quickstart, which is removed at the end:

    volume/      what `apollofs up` keeps: the private etcd, the bodies of the first site
    blobs-east/  the bodies of the second site
    cache-east/  the second mount's cache
    west, east   the two mountpoints
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree

MIB = 1 << 20
COMMAND = Path(sys.executable).with_name("apollofs")
RANK = Path(__file__).with_name("quickstart_rank.py")
OTHER_SITE = "east"
COMMAND_DEADLINE_S = 120
RANKS_DEADLINE_S = 600
# Staging, cache and blobs hold a copy each, and the other mount caches what it reads.
COPIES = 5


class QuickstartError(Exception):
    """A step failed; the message is what the person should read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of one quickstart."""

    state: Path

    @property
    def volume(self) -> Path:
        return self.state / "volume"

    @property
    def blobs(self) -> Path:
        return self.state / f"blobs-{OTHER_SITE}"

    @property
    def cache(self) -> Path:
        return self.state / f"cache-{OTHER_SITE}"

    @property
    def first(self) -> Path:
        return self.state / "west"

    @property
    def second(self) -> Path:
        return self.state / OTHER_SITE


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted there, also if whoever served it is dead (os.path.ismount says no then)."""
    escaped = os.fsencode(directory)
    for plain in b"\\ \t\n":
        escaped = escaped.replace(bytes([plain]), b"\\%03o" % plain)
    return any(line.split(b" ")[4] == escaped for line in Path("/proc/self/mountinfo").read_bytes().splitlines())


class Apollofs:
    """The command line, shown as it is used."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def run(self, *arguments: object) -> str:
        """Runs `apollofs ARGUMENTS...` and returns what it printed.

        Raises QuickstartError with its error output if it fails or does not end in time.
        """
        words = [str(argument) for argument in arguments]
        self._console.print(f"[bold cyan]$[/] apollofs {shlex.join(words)}", highlight=False, soft_wrap=True)
        try:
            done = subprocess.run(
                [COMMAND, *words], capture_output=True, text=True, check=False, timeout=COMMAND_DEADLINE_S
            )
        except subprocess.TimeoutExpired as exc:
            raise QuickstartError(f"apollofs {words[0]} did not end within {COMMAND_DEADLINE_S} s") from exc
        if done.returncode != 0:
            raise QuickstartError(f"apollofs {words[0]} failed:\n{(done.stderr or done.stdout).strip()}")
        return done.stdout

    def report(self, *arguments: object) -> Any:
        """What a command reports with --json."""
        return json.loads(self.run(*arguments, "--json"))

    def show(self, *arguments: object) -> None:
        """Runs a command and prints its output as it is."""
        self._console.out(self.run(*arguments), end="", highlight=False)


def mounted(apollofs: Apollofs, layout: Layout) -> str:
    """Brings up a private volume, adds a second site and mounts that too; returns the volume's URL."""
    for directory in (layout.volume, layout.blobs, layout.cache, layout.first, layout.second):
        directory.mkdir(parents=True, exist_ok=True)
    url = str(apollofs.report("up", layout.volume, layout.first)["meta_url"])
    sites = apollofs.report("site", "list", url)
    if OTHER_SITE not in {site["name"] for site in sites}:
        apollofs.run("site", "add", url, "--site", OTHER_SITE, "--blobs", layout.blobs.as_uri())
    apollofs.run("mount", url, layout.second, "--site", OTHER_SITE, "--cache-dir", layout.cache)
    return url


def take_down(apollofs: Apollofs, layout: Layout) -> None:
    """Unmounts both mounts and ends the private etcd; what is not there needs no ending."""
    if is_mounted(layout.second):
        apollofs.run("umount", layout.second)
    if any((layout.volume / name).exists() for name in ("apollofs.json", "etcd")):
        apollofs.run("down", layout.volume)


def run_ranks(commands: list[list[str]]) -> list[dict[str, Any]]:
    """One process for each command, all at once; what each printed, in order.

    Raises QuickstartError if one fails or they do not end in time; none is left running then.
    """
    deadline = time.monotonic() + RANKS_DEADLINE_S
    ranks = [
        subprocess.Popen([sys.executable, RANK, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    results = []
    try:
        for index, rank in enumerate(ranks):
            output, errors = rank.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if rank.returncode != 0:
                raise QuickstartError(f"rank {index} failed:\n{errors.strip()}")
            results.append(json.loads(output))
    except subprocess.TimeoutExpired as exc:
        raise QuickstartError(f"the ranks did not end within {RANKS_DEADLINE_S} s") from exc
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    return results


def save_and_verify(console: Console, layout: Layout, ranks: int, megabytes: int) -> None:
    """Every rank saves on the first mount; every file is read and verified on the second."""
    step = f"step-{time.strftime('%Y%m%d-%H%M%S')}"
    saved_in, loaded_from = (mount / "checkpoints" / step for mount in (layout.first, layout.second))
    saved_in.mkdir(parents=True)
    names = [f"rank-{index:02}.pt" for index in range(ranks)]

    console.rule(f"{ranks} ranks save {megabytes} MiB each on {layout.first.name}: write, fsync, rename")
    start = time.monotonic()
    commands = [["save", str(saved_in / name), str(megabytes), str(index)] for index, name in enumerate(names)]
    saved = run_ranks(commands)
    save_s = time.monotonic() - start

    console.rule(f"{ranks} ranks load them on {layout.second.name}, whose own site holds none of the bytes")
    start = time.monotonic()
    loaded = run_ranks([["load", str(loaded_from / name)] for name in names])
    load_s = time.monotonic() - start

    table = Table("file", "size", "saved", "loaded", "SHA-256", title="torch.save" if saved[0]["torch"] else None)
    for name, out, back in zip(names, saved, loaded, strict=True):
        same = out["sha256"] == back["sha256"] and out["bytes"] == back["bytes"]
        verdict = f"[green]{out['sha256'][:12]} same[/]" if same else f"[red]{back['sha256'][:12]} DIFFERS[/]"
        times = f"{out['seconds']:.2f} s", f"{back['seconds']:.2f} s"
        table.add_row(name, decimal(out["bytes"]), *times, verdict)
    console.print(table)
    total = sum(out["bytes"] for out in saved)
    for verb, seconds in (("saved", save_s), ("loaded", load_s)):
        console.print(f"{verb} {decimal(total)} in {seconds:.2f} s, {decimal(int(total / seconds))} a second")
    differing = [name for name, out, back in zip(names, saved, loaded, strict=True) if out["sha256"] != back["sha256"]]
    if differing:
        raise QuickstartError(f"not the bytes that were saved: {', '.join(differing)}")


def tree_of(directory: Path) -> Tree:
    """The files below a directory, with their sizes."""
    tree = Tree(f"[bold]{directory}[/]")
    branches = {directory: tree}
    for parent, folders, files in os.walk(directory):
        folders.sort()
        branch = branches[Path(parent)]
        for name in folders:
            branches[Path(parent, name)] = branch.add(f"[bold]{name}/[/]")
        for name in sorted(files):
            branch.add(f"{name}  [dim]{decimal(Path(parent, name).stat().st_size)}[/]")
    return tree


def what_next(layout: Layout, url: str, *, kept: bool) -> list[str]:
    """Lines to go on with; commands stand alone on a line, so that they can be copied."""
    if not kept:
        return [
            "Run this again with --keep, and both mounts stay for you to play with.",
            "On real servers it is one command, then one mount on each node (README.md, docs/POSIX.md):",
            "  apollofs format etcd://HOST:2379,HOST2:2379/VOLUME --site NAME --blobs s3://BUCKET/PREFIX",
            "  apollofs mount etcd://HOST:2379,HOST2:2379/VOLUME /mnt --site NAME --cache-dir /var/cache/apollofs",
        ]
    command, first, second, volume = (
        shlex.quote(str(path)) for path in (COMMAND, layout.first, layout.second, layout.volume)
    )
    return [
        "Both mounts are there. What one writes, the other reads:",
        f"  echo hello > {first}/hello; cat {second}/hello",
        f"  {command} info {second}/hello",
        f"  {command} status {first}",
        f"  {command} check {shlex.quote(url)}",
        "To end it (scripts/quickstart removes the data at its next run without --keep):",
        f"  {command} umount {second}; {command} down {volume}",
    ]


@contextmanager
def cleaned_up(apollofs: Apollofs, layout: Layout, *, keep: bool) -> Iterator[None]:
    """Takes everything down and removes it at the end, however that comes; nothing of that with keep."""
    try:
        yield
    finally:
        if not keep:
            take_down(apollofs, layout)
            for mount in (layout.first, layout.second):
                if is_mounted(mount):
                    raise QuickstartError(f"{mount} is still mounted; nothing was removed")
            shutil.rmtree(layout.state)


def parse(arguments: list[str]) -> argparse.Namespace:
    state_home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description="apollofs in one minute")
    parser.add_argument(
        "--directory", type=Path, default=Path(state_home), help="where to make the directory apollofs-quickstart"
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes that save at once")
    parser.add_argument("--megabytes", type=int, default=32, help="size of each rank's file, in MiB")
    parser.add_argument("--keep", action="store_true", help="leave both mounts and the data")
    options = parser.parse_args(arguments)
    if not 1 <= options.ranks <= 64 or not 1 <= options.megabytes <= 4096:
        parser.error("--ranks must be 1 to 64, --megabytes 1 to 4096")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = Console()
    layout = Layout(options.directory.expanduser().absolute() / "apollofs-quickstart")
    apollofs = Apollofs(console)
    try:
        layout.state.mkdir(parents=True, exist_ok=True)
        needed = options.ranks * options.megabytes * MIB * COPIES
        if shutil.disk_usage(layout.state).free < needed:
            raise QuickstartError(f"{layout.state} needs {decimal(needed)} of free space")
        take_down(apollofs, layout)
        with cleaned_up(apollofs, layout, keep=options.keep):
            console.rule("one namespace, two sites, two mounts")
            url = mounted(apollofs, layout)
            save_and_verify(console, layout, options.ranks, options.megabytes)
            console.rule("who has it mounted, and what is in it")
            apollofs.show("mounts", url)
            console.print(tree_of(layout.second))
            console.rule("what next")
            console.out("\n".join(what_next(layout, url, kept=options.keep)), highlight=False)
    except QuickstartError as exc:
        console.print(f"[bold red]quickstart:[/] {exc}", highlight=False, soft_wrap=True)
        return 1
    console.print("[bold green]All of it was loaded as it was saved.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
