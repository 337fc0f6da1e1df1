"""What reports look like: tables and pairs for people, JSON for machines."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

PIPE_COLUMNS = 2000
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    """One document, indented; bytes that are no UTF-8 were escaped before."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def one_line(text: str) -> str:
    """Control characters, which a terminal would obey, and bytes that are no UTF-8 are escaped. What was escaped before
    stays."""
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table, or the sentence `empty`. Long words are folded, never cut."""
    listed = [[one_line(str(cell)) for cell in row] for row in rows]
    if not listed:
        click.echo(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in listed:
        table.add_row(*row)
    # what reads a pipe wants one line a row, however long
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(highlight=False, markup=False, width=width).print(table)


def print_pairs(pairs: Mapping[str, object]) -> None:
    """One fact a line, aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name:<{width}}  {one_line(str(value))}")


def size_text(size_bytes: int) -> str:
    """ "1.5 MB"."""
    return decimal(size_bytes)


def time_text(seconds: float) -> str:
    """Local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def age_text(seconds: float) -> str:
    """ "3d 4h", "12m 5s": the two largest units."""
    left = int(max(0.0, seconds))
    parts: list[str] = []
    for letter, unit in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= unit or (letter == "s" and not parts):
            parts.append(f"{left // unit}{letter}")
        left %= unit
    return " ".join(parts[:2])
