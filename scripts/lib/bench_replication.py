"""Copying bodies from one site's store to another's: how fast, and what it costs the agent. See scripts/bench.

Beside it, in the same rounds, a client without apollofs: it puts, gets, and copies as many bytes through itself, with
as many requests at once, on the same gateway.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_agents import Watched, watched_agent
from bench_bodies import Bucket, Cost, raw_copy_cost, raw_costs, save
from bench_systems import make_bucket

from tests.mounted.harness import GatewayBodies, Namespace
from tests.support.radosgw_server import RadosGateway

FROM, TO = "west", "east"
RAW = ("bench-raw", "bench-raw-copy")
FILE_BYTES = 256 << 20
COPY_S = 1200.0
PUT, GET, COPY, AGENT = "bare PUT", "bare GET", "bare copy", "agent"


@dataclass(frozen=True)
class Findings:
    """Medians over the rounds, and the most memory that the agent has had."""

    gigabytes: float
    rounds: int
    costs: dict[str, Cost]
    agent_peak_bytes: int


def copied(namespace: Namespace, agent: Watched, number: int, size: int) -> Cost:
    """Save files at one site, then have them wanted at the other: what the agent spends until they are there."""
    directory = f"round{number}"
    mount = namespace.mount(FROM)
    (mount.path / directory).mkdir()
    for at in range(0, size, FILE_BYTES):
        save(f"{mount.path}/{directory}/{at // FILE_BYTES}", min(FILE_BYTES, size - at))
    mount.unmount()
    before, spent_s = agent.counters()["copied_bytes"], agent.processor_s()
    namespace.command("policy", "set", namespace.url, f"/{directory}", "--async", TO)
    began = time.perf_counter()
    agent.wait(lambda now: now["copied_bytes"] - before >= size and not now["backlog"], COPY_S)
    return Cost.of(size, time.perf_counter() - began, agent.processor_s() - spent_s)


def run(gigabytes: float, rounds: int, directory: Path) -> Findings:
    size = int(gigabytes * (1 << 30))
    seen: dict[str, list[Cost]] = {name: [] for name in (PUT, GET, COPY, AGENT)}
    with RadosGateway.started(directory / "rgw", disk_bytes=(2 * rounds + 4) * size + (8 << 30)) as gateway:
        user = gateway.create_user("apollofs-tests")
        raw = [Bucket(gateway.endpoint, name, user.access_key, user.secret_key) for name in RAW]
        for bucket in raw:
            make_bucket(gateway, user, bucket.name)
        sites = [GatewayBodies(site, gateway, f"bench-{site}") for site in (FROM, TO)]
        with Namespace.made(directory / "volume", sites) as namespace, watched_agent(namespace, TO) as agent:
            for number in range(rounds):
                put, get = raw_costs(raw[0], size)
                costs = {PUT: put, GET: get, COPY: raw_copy_cost(*raw, size)}
                costs[AGENT] = copied(namespace, agent, number, size)
                for name, cost in costs.items():
                    seen[name].append(cost)
                print(f"round {number}: the agent took {costs[AGENT].core_s_per_gb:.2f} core-s/GB", flush=True)
            peak = agent.peak_bytes()
    return Findings(gigabytes, rounds, {name: middle(costs) for name, costs in seen.items()}, peak)


def middle(costs: list[Cost]) -> Cost:
    """The median of each of both."""
    return Cost(
        statistics.median(cost.mb_per_second for cost in costs), statistics.median(cost.core_s_per_gb for cost in costs)
    )


def show(found: Findings) -> None:
    print(f"{'':12}{'MB/s':>8}{'core-s/GB':>12}")
    for name, cost in found.costs.items():
        print(f"{name:12}{cost.mb_per_second:8.0f}{cost.core_s_per_gb:12.2f}")
    agent, slower = found.costs[AGENT], min(found.costs[PUT].mb_per_second, found.costs[GET].mb_per_second)
    print(f"agent to the slower of PUT and GET: {agent.mb_per_second / slower:.2f}")
    print(f"agent to the bare copy: {agent.mb_per_second / found.costs[COPY].mb_per_second:.2f}")
    print(f"most memory of the agent: {found.agent_peak_bytes >> 20} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench replication", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1, help="GiB that are copied in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory:
        found = run(arguments.gigabytes, arguments.rounds, Path(directory))
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
