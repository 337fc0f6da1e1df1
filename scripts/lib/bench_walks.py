"""Processes that walk a tree again and again, and the one that changes it: both keep what must be compared."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_fill import file_names
from bench_history import Event, Glance, History, Listing, Place
from bench_processes import create

REPORT_DEADLINE_S = 120.0


# -- changing --------------------------------------------------------------------------------------------------------


class Changer:
    """Makes, renames, replaces and removes files in a tree, one operation at a time."""

    def __init__(self, tree: Path, directories: int, files: int, chance: random.Random) -> None:
        self._tree = tree
        self._chance = chance
        self._names = {f"d{number}": set(file_names(files)) for number in range(directories)}
        self._last: dict[Place, int] = {}
        self.history = History(frozenset(file_names(files)))
        self.done = 0

    def one(self) -> None:
        """One operation, chosen by chance."""
        self.done += 1
        self._chance.choice([self._make, self._remove, self._rename, self._rename, self._replace])()

    def _make(self) -> None:
        place = self._new_place()
        self._did(lambda: create(self._path(place)), made=place)

    def _remove(self) -> None:
        place = self._old_place()
        self._did(lambda: os.unlink(self._path(place)), gone=place)

    def _rename(self) -> None:
        self._move(self._new_place())

    def _replace(self) -> None:
        self._move(self._old_place())

    def _move(self, target: Place) -> None:
        source = self._old_place()
        if source != target:
            self._did(lambda: os.rename(self._path(source), self._path(target)), gone=source, made=target)

    def _did(self, operation: Any, *, gone: Place | None = None, made: Place | None = None) -> None:
        began = time.monotonic()
        operation()
        ended = time.monotonic()
        self._last = {}
        changes = [(gone, False), (made, True)]
        self.history.add(Event(place, present, began, ended) for place, present in changes if place is not None)
        if gone is not None:
            self._names[gone[0]].discard(gone[1])
            self._last[gone] = 0
        if made is not None:
            self._names[made[0]].add(made[1])
            self._last[made] = os.lstat(self._path(made)).st_ino

    def wrong_in(self, tree: Path) -> Iterator[str]:
        """What another mount shows, now that the last operation has returned, that is not what it did."""
        for place, expected in self._last.items():
            try:
                found = os.lstat(tree / place[0] / place[1]).st_ino
            except FileNotFoundError:
                found = 0
            if found != expected:
                yield f"{tree}: {'/'.join(place)} is inode {found}, not {expected}"

    def _path(self, place: Place) -> str:
        return str(self._tree / place[0] / place[1])

    def _new_place(self) -> Place:
        return self._chance.choice(list(self._names)), f"n{self.done}"

    def _old_place(self) -> Place:
        directory = self._chance.choice([directory for directory, names in self._names.items() if names])
        return directory, self._chance.choice(sorted(self._names[directory]))


# -- walking ---------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a walker has seen. `walk_s`: how long each whole walk took."""

    seen: list[Listing | Glance] = field(default_factory=list)
    walk_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Walker:
    """Lists and stats everything below a tree. `base`: what each directory was filled with."""

    tree: Path
    base: frozenset[str]

    def walk(self, report: Report) -> None:
        began = moment = time.monotonic()
        for path, _, files in os.walk(self.tree):
            names, ended = frozenset(files), time.monotonic()
            if path != str(self.tree):
                directory = os.path.basename(path)
                report.seen.append(Listing(directory, moment, ended, names - self.base, self.base - names))
                report.seen += self._stat_all(directory, files)
            moment = time.monotonic()
        report.walk_s.append(time.monotonic() - began)

    def _stat_all(self, directory: str, files: Sequence[str]) -> Iterator[Glance]:
        for name in files:
            began = time.monotonic()
            try:
                os.lstat(self.tree / directory / name)
            except FileNotFoundError:
                yield Glance((directory, name), began, time.monotonic())


class Walks:
    """Walkers at work, each in a process of its own."""

    def __init__(self, links: Sequence[Connection]) -> None:
        self._links = links
        self._walked = [0] * len(links)

    def fewest(self) -> int:
        """How many whole walks the slowest one has done."""
        for number, link in enumerate(self._links):
            while link.poll():
                self._walked[number] = link.recv()
        return min(self._walked)

    def reports(self) -> list[Report]:
        """End the walks, and hear of them."""
        for link in self._links:
            link.send(None)
        return [self._report(link) for link in self._links]

    def _report(self, link: Connection) -> Report:
        while link.poll(REPORT_DEADLINE_S):
            report = link.recv()
            if isinstance(report, Report):
                return report
        raise RuntimeError("a walker does not end")


@contextmanager
def walking(walkers: Sequence[Walker]) -> Iterator[Walks]:
    """They walk until `reports` is called, or the block ends."""
    pipes = [multiprocessing.Pipe() for _ in walkers]
    processes = [
        multiprocessing.Process(target=_serve, args=(walker, there))
        for walker, (_, there) in zip(walkers, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        yield Walks([here for here, _ in pipes])
    finally:
        for process in processes:
            process.join(1)
            process.kill()
            process.join()


def _serve(walker: Walker, link: Connection) -> None:
    report = Report()
    while not link.poll():
        walker.walk(report)
        link.send(len(report.walk_s))
    link.send(report)
