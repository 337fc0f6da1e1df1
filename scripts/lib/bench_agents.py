"""Agents of sites as benchmarks watch them: what they count, what they cost, and how much memory they take."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench_processes import memory_bytes, process_s

from apollofs.fs.embedded import free_ports
from tests.mounted.agents import AgentProcess, start_agent
from tests.mounted.harness import Namespace

LOOK_EVERY_S = 1.0
"""Each look costs the agent some milliseconds."""
ANSWER_S = 30.0
LEASE_S = "60"
"""A busy machine is no reason to begin anew."""


@dataclass(frozen=True)
class Watched:
    """One agent. `port`: where it serves its counters."""

    agent: AgentProcess
    port: int

    @property
    def pid(self) -> int:
        return self.agent.process.pid

    def counters(self) -> dict[str, float]:
        """What it counts of its work, as `agent status` names it; empty while it does not answer yet."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=ANSWER_S) as answer:
                lines = answer.read().decode().splitlines()
        except (urllib.error.URLError, ConnectionError):
            return {}
        found = (line.partition("{") for line in lines if line.startswith("apollofs_agent_"))
        return {
            name.removeprefix("apollofs_agent_").removesuffix("_total"): float(rest.rpartition(" ")[2])
            for name, _, rest in found
        }

    def wait(self, until: Callable[[dict[str, float]], bool], deadline_s: float) -> dict[str, float]:
        """What it counts once that is so. Raises RuntimeError where the agent has ended, or after `deadline_s`."""
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            found = self.counters()
            if found and until(found):
                return found
            if self.agent.process.poll() is not None:
                break
            time.sleep(LOOK_EVERY_S)
        raise RuntimeError(f"the agent {self.pid} did not get so far: {self.agent.log.path.read_text()[-2000:]}")

    def processor_s(self) -> float:
        """The processor time that it has spent so far, seconds."""
        return process_s(self.pid)

    def peak_bytes(self) -> int:
        """The most memory that it has had."""
        return memory_bytes(self.pid, "VmHWM")


@contextmanager
def watched_agent(namespace: Namespace, site: str, *options: str) -> Iterator[Watched]:
    """An agent that is elected, and ends with the block. A warning in its log is an error."""
    (port,) = free_ports(1)
    agent = start_agent(namespace, site, "--metrics", str(port), "--lease-ttl", LEASE_S, *options)
    try:
        watched = Watched(agent, port)
        watched.wait(lambda counted: counted.get("elected", 0) > 0, ANSWER_S)
        yield watched
        agent.process.send_signal(signal.SIGTERM)
        agent.process.wait(ANSWER_S)
    finally:
        agent.kill()
    alarms = agent.log.news()
    if alarms:
        raise RuntimeError("\n".join(alarms))
