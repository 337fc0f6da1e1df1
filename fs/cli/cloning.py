"""`clone`: a file or a tree once more, without copying its bytes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from apollofs.fs.cli.output import json_option, print_json, size_text
from apollofs.fs.tree_clone import Cloned
from apollofs.fs.tree_clone import clone as clone_tree
from apollofs.metadata.name_text import name_text

REPORT_EVERY_S = 1.0


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@json_option
def clone(source: str, target: str, as_json: bool) -> None:
    """Make DST a clone of SRC, a file or a tree, within one mount.

    Bodies are shared, not copied; what is written to one later is not seen in the other. Modes, owners, times, extended
    attributes, symlinks and hard links are kept. DST must not exist; it appears when all of it is there.
    """
    with _ended_in_order():
        cloned = clone_tree(source, target, _Progress(shown=not as_json))
    facts = {
        "files": cloned.files,
        "directories": cloned.directories,
        "others": cloned.others,
        "size_bytes": cloned.size_bytes,
    }
    if as_json:
        print_json(facts)
    else:
        click.echo(f"{name_text(os.fsencode(target))}: {_text(cloned)}")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored, end the command as Ctrl-C does: what was made is taken away again."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _Progress:
    """Says now and then, on a terminal, how far it is."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._next = time.monotonic() + REPORT_EVERY_S

    def __call__(self, cloned: Cloned) -> None:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + REPORT_EVERY_S
            click.echo(f"\r{_text(cloned)} ...", nl=False, err=True)


def _text(cloned: Cloned) -> str:
    return f"{cloned.files} files ({size_text(cloned.size_bytes)}), {cloned.directories} directories"
