"""Inference at a site: follows the change log, and loads weights the moment that they are published."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from demo_timeline import DemoError

from tests.mounted.harness import ROOT, Mount

END_S = 10.0


@dataclass(frozen=True)
class Loaded:
    """What was read: SHA-256 by file name, and when, by `monotonic`: told by the log, all of it read."""

    told_s: float
    read_s: float
    digests: dict[str, str]


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a directory. Raises OSError."""
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in sorted(os.listdir(directory))}


class Inference:
    """Runs `apollofs changes --follow` on a directory of a mount, and reads what is renamed into it."""

    def __init__(self, mount: Mount, url: str, directory: str) -> None:
        """`directory`: its path in the volume. Follows from the beginning on, so that nothing is missed."""
        self._top = mount.path / directory
        self._loaded: dict[str, Loaded] = {}
        self._failure: Exception | None = None
        self._news = threading.Condition()
        words = ["changes", url, f"/{directory}", "--from", "beginning", "--follow", "--json"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "apollofs.fs.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=mount.namespace.environment(),
            cwd=ROOT,
        )
        self._thread = threading.Thread(target=self._follow, name="inference")
        self._thread.start()

    def loaded(self, name: str, within_s: float) -> Loaded:
        """Wait for what was published under a name. Raises DemoError if it does not come, or can't be read."""
        with self._news:
            self._news.wait_for(lambda: name in self._loaded or self._failure is not None, within_s)
            if name not in self._loaded:
                raise DemoError(f"inference has not loaded {name}: {self._failure or 'it did not hear of it'}")
            return self._loaded[name]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(END_S)
        self._thread.join(END_S)

    def _follow(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                change = json.loads(line)
                if change["kind"] == "rename" and change["path"] == f"/{self._top.name}/{change['name']}":
                    self._load(change["name"])

    def _load(self, name: str) -> None:
        told_s = monotonic()
        try:
            found = digests(self._top / name)
        except OSError as exc:
            with self._news:
                self._failure = exc
                self._news.notify_all()
            return
        with self._news:
            self._loaded[name] = Loaded(told_s, monotonic(), found)
            self._news.notify_all()
