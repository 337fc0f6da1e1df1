"""Processes of `apollofs agent` for tests on mounts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mounted.harness import END_DEADLINE_S, ROOT, LogReader, Namespace

LEASE_S = 2
OBJECT = re.compile("[0-9a-f]{8}")


@dataclass
class AgentProcess:
    """One candidate; its log is checked by whoever has started it."""

    process: subprocess.Popen[bytes]
    log: LogReader

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(END_DEADLINE_S)


def start_agent(namespace: Namespace, site: str, *options: str, url: str = "") -> AgentProcess:
    """A candidate for a site; `kill` or `running` ends it. `url` leads to etcd another way, through a proxy."""
    log = namespace.directory / f"agent-{site}.log"
    words = ["agent", url or namespace.url, "--site", site, "--gc-every", "0", "--lease-ttl", str(LEASE_S)]
    process = subprocess.Popen(
        [sys.executable, "-m", "apollofs.fs.cli", *words, "--log-file", str(log), *options],
        stdin=subprocess.DEVNULL,
        env=namespace.environment(),
        cwd=ROOT,
    )
    return AgentProcess(process, LogReader(log))


@contextmanager
def running(namespace: Namespace, *sites: str) -> Iterator[list[AgentProcess]]:
    """One agent for each of these sites; they end with the block, well."""
    agents = [start_agent(namespace, site) for site in sites]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.process.send_signal(signal.SIGTERM)
        ended = [agent.process.wait(END_DEADLINE_S) for agent in agents]
        assert ended == [0] * len(agents)


def status_of(namespace: Namespace, site: str) -> dict[str, Any]:
    """What `agent status` says of a site."""
    found: dict[str, Any] = next(
        each for each in namespace.report("agent", "status", namespace.url) if each["site"] == site
    )
    return found


def objects(namespace: Namespace, site: str) -> set[str]:
    """The names of the objects in a site's directory."""
    top = Path(namespace.directory / f"blobs-{site}")
    return {str(Path(*path.parts[-3:])) for path in top.glob("volume-*/**/*") if OBJECT.fullmatch(path.name)}
