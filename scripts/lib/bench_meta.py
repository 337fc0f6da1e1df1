"""Metadata operations a second, beside the etcd requests that each takes. See scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench_processes import Call, create, each, fan
from bench_systems import Servers, apollofs, juicefs, servers

PROCESSES = 16
NAME_WIDTH = 12


@dataclass(frozen=True)
class Measure:
    """One figure of one round."""

    name: str
    per_second: float
    requests_each: float


class Meter:
    """Measures calls in one directory of one mount."""

    def __init__(self, on: Servers, directory: Path, files: int) -> None:
        self._on = on
        self._directory = directory
        self._files = files

    def measures(self) -> Iterator[Measure]:
        """One round: everything that is made is removed again."""
        files = [str(self._directory / f"f{number}") for number in range(self._files)]
        renamed = [f"{path}.r" for path in files]
        directories = [str(self._directory / f"d{number}") for number in range(self._files)]
        yield self._measure("create_1", len(files), lambda: each(create, files))
        yield self._measure("stat", len(files), lambda: each(os.stat, files))
        yield self._measure("ls -l", len(files), lambda: list_long(self._directory))
        yield self._measure("rename_1", len(files), lambda: each(rename, files))
        yield self._measure("unlink_1", len(files), lambda: each(os.unlink, renamed))
        yield self._measure("mkdir_1", len(files), lambda: each(os.mkdir, directories))
        yield self._measure("rmdir_1", len(files), lambda: each(os.rmdir, directories))
        shared = self._files // 4
        yield self._measure("create_16", PROCESSES * shared, lambda: self._fan(create, shared))
        yield self._measure("unlink_16", PROCESSES * shared, lambda: self._fan(os.unlink, shared))

    def _measure(self, name: str, count: int, work: Callable[[], float]) -> Measure:
        requests = self._on.requests()
        seconds = work()
        return Measure(name, count / seconds, (self._on.requests() - requests) / count)

    def _fan(self, call: Call, count: int) -> float:
        """Seconds that the processes took, in one directory."""
        return fan(
            call, [[str(self._directory / f"p{worker}.{n}") for n in range(count)] for worker in range(PROCESSES)]
        )


def rename(path: str) -> None:
    os.rename(path, f"{path}.r")


def list_long(directory: Path) -> float:
    began = time.perf_counter()
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
    return time.perf_counter() - began


def run(options: argparse.Namespace) -> dict[str, list[Measure]]:
    """All rounds of all systems, interleaved: what else the machine does hits them alike."""
    program = shutil.which(options.juicefs)
    found: dict[str, list[Measure]] = {}
    with servers() as on, ExitStack() as stack:
        mounts = {"juicefs": stack.enter_context(juicefs(on, program))} if program else {}
        mounts["apollofs"] = stack.enter_context(apollofs(on))
        for number in range(options.rounds):
            for system, mountpoint in mounts.items():
                directory = mountpoint / f"round{number}"
                directory.mkdir()
                found.setdefault(system, []).extend(Meter(on, directory, options.files).measures())
                directory.rmdir()
    return found


def summary(found: dict[str, list[Measure]]) -> list[dict[str, object]]:
    """A row for each figure: medians over the rounds, and the ratio to JuiceFS where that was measured."""
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys(measure.name for measure in found["apollofs"]):
        row: dict[str, object] = {"name": name}
        for system, measures in found.items():
            mine = [measure for measure in measures if measure.name == name]
            row[system] = statistics.median(measure.per_second for measure in mine)
            row[f"{system}_requests"] = statistics.median(measure.requests_each for measure in mine)
        if "juicefs" in found:
            row["ratio"] = row["apollofs"] / row["juicefs"]  # type: ignore[operator]
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench meta", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=400, help="files and directories a figure (16 processes: 4 times)")
    parser.add_argument("--juicefs", default="juicefs", help="the JuiceFS program; measured too where it is found")
    parser.add_argument("--json", default="", help="write every figure of every round there")
    options = parser.parse_args()
    found = run(options)
    rows = summary(found)
    columns = [*(f"{system}{suffix}" for system in found for suffix in ("", "_requests"))]
    columns += ["ratio"] if "juicefs" in found else []
    print(" " * NAME_WIDTH + "".join(f"{column:>20}" for column in columns))
    for row in rows:
        print(f"{row['name']:<{NAME_WIDTH}}" + "".join(f"{row[column]:>20.2f}" for column in columns))
    if options.json:
        rounds = {system: [vars(measure) for measure in measures] for system, measures in found.items()}
        Path(options.json).write_text(json.dumps({"medians": rows, "rounds": rounds}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
