"""The story of scripts/demo-sites, chapter by chapter. Each says what it does, does it, and sees that it was so.

Training saves at A, and B has copies by policy; inference at C follows the change log, and C has a sealed dataset. Then
A's store stops, the leader of etcd stops, C is cut off from etcd, and everything heals. What has been stopped stays so
until the end.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from demo_inference import Inference, digests
from demo_partition import NEW, cut_off
from demo_timeline import WAIT_S, Timeline, expect, wait_until

from tests.mounted.agents import AgentProcess, status_of
from tests.mounted.harness import Mount
from tests.mounted.three_sites import ROUND_TRIPS_MS, SITES, ThreeSites
from tests.support.etcd_server import EtcdServer

LEASE_S = 5
MIB = 1 << 20
RANKS, RANK_BYTES = 2, 3 * MIB
SHARDS, SHARD_BYTES = 2, 2 * MIB
STEPS, WEIGHTS = 3, 2
OPTIONS = ("--lease-ttl", str(LEASE_S), "-o", "operation_deadline=10,commit_deadline=600", "--cache-size", "1G")
AGENT_OPTIONS = ("--no-compact", "--retention-every", "0")
LOGGED = (r"lease", r"session", r"etcd", r"watch", r"site", r"store", r"s3", r"uncommitted")
"""What mounts and agents may say of the faults."""


@dataclass
class Cast:
    """Who plays. `late`: a save at A whose store is away."""

    sites: ThreeSites
    timeline: Timeline
    pool: ThreadPoolExecutor
    mounts: dict[str, Mount] = field(default_factory=dict)
    agents: dict[str, AgentProcess] = field(default_factory=dict)
    stopped: list[EtcdServer] = field(default_factory=list)
    late: Future[float] | None = None

    def root(self, site: str) -> Path:
        return self.mounts[site].path


def tell(sites: ThreeSites, timeline: Timeline) -> None:
    """All of it. Raises DemoError where something is not as it should be, HarnessError where a command fails."""
    with ThreadPoolExecutor() as pool, cast(sites, timeline, pool) as players:
        agree(players)
        train(players)
        hand_over(players)
        seal(players)
        stop_the_store(players)
        stop_a_member(players)
        cut_off(players.root("b"), players.mounts["c"], sites.ways["c"], timeline, LEASE_S)
        heal(players)


@contextmanager
def cast(sites: ThreeSites, timeline: Timeline, pool: ThreadPoolExecutor) -> Iterator[Cast]:
    """Everybody at work; agents end with the block, mounts with their namespace. All is mended before that."""
    players = Cast(sites, timeline, pool)
    for site, ms in ROUND_TRIPS_MS.items():
        timeline.tell(site, f"mount and agent, {ms:g} ms from etcd")
        players.mounts[site] = sites.mount(site, *OPTIONS)
        players.mounts[site].expected_logs += LOGGED
        players.agents[site] = sites.start_agent(site, *AGENT_OPTIONS)
    try:
        yield players
    finally:
        sites.heal()
        for server in players.stopped:
            server.start()
        for agent in players.agents.values():
            agent.process.terminate()
        ended = [agent.process.wait(WAIT_S) for agent in players.agents.values()]
    expect(ended == [0] * len(ended), f"the agents end well: {ended}")


# -- while all is well -----------------------------------------------------------------------------------------------


def agree(players: Cast) -> None:
    players.timeline.chapter("policies: B gets copies of checkpoints soon, and of weights before close returns")
    namespace, url = players.sites.namespace, players.sites.url("a")
    for name in ("checkpoints", "weights", "datasets", "state"):
        (players.root("a") / name).mkdir()
    namespace.command("policy", "set", url, "/checkpoints", "--async", "b", "--bound", "30s")
    namespace.command("policy", "set", url, "/weights", "--commit", "b")


def save(directory: Path, seed: str, files: int, size: int) -> float:
    """Files 0.pt, 1.pt, ... in a new directory, each fsynced; how long it took, seconds."""
    began = monotonic()
    directory.mkdir()
    for number in range(files):
        with (directory / f"{number}.pt").open("wb", buffering=0) as file:
            file.write(random.Random(f"{seed} {number}").randbytes(size))
            os.fsync(file.fileno())
    return monotonic() - began


def is_saved(directory: Path, seed: str, files: int, size: int) -> bool:
    """Whether exactly what `save` has written is there. Raises OSError."""
    names = sorted(os.listdir(directory))
    return names == [f"{number}.pt" for number in range(files)] and all(
        (directory / f"{number}.pt").read_bytes() == random.Random(f"{seed} {number}").randbytes(size)
        for number in range(files)
    )


def are_copied(players: Cast, directory: Path, site: str) -> bool:
    """Whether a site has all bodies of a directory, as the volume knows it."""
    found = [players.sites.namespace.report("info", str(path)) for path in directory.iterdir()]
    return all(site in extent["sites"] for one in found for extent in one["extents"])


def train(players: Cast) -> None:
    timeline, top = players.timeline, players.root("a") / "checkpoints"
    timeline.chapter("training at A saves checkpoints")
    for step in range(1, STEPS + 1):
        took_s = save(top / f"step-{step}", f"step-{step}", RANKS, RANK_BYTES)
        size = RANKS * RANK_BYTES // MIB
        timeline.tell("a", f"saved step-{step}, {size} MiB, in {timeline.measured(f'save {step}', took_s)}")
    began = monotonic()
    for step in range(1, STEPS + 1):
        wait_until(lambda step=step: are_copied(players, top / f"step-{step}", "b"), "B has copies")  # type: ignore[misc]
    timeline.tell("b", f"has copies of all, {timeline.measured('copies', monotonic() - began)} after the last fsync")


def hand_over(players: Cast) -> None:
    timeline, top = players.timeline, players.root("a") / "weights"
    timeline.chapter("weights are published to B and C; inference at C follows the log and loads them")
    inference = Inference(players.mounts["c"], players.sites.url("c"), "weights")
    try:
        for number in range(1, WEIGHTS + 1):
            name = f"v{number}"
            save(top / f".{name}", name, SHARDS, SHARD_BYTES)
            began = monotonic()
            words = ("publish", str(top / f".{name}"), str(top / name), "--sites", "b,c")
            told = players.sites.namespace.report(*words)
            published_s = monotonic() - began
            loaded = inference.loaded(name, WAIT_S)
            expect(loaded.digests == digests(top / name), f"C has loaded the bytes of {name}")
            copied, took = told["copied_bytes"], timeline.measured(f"publish {number}", published_s)
            expect(copied == SHARDS * SHARD_BYTES, "C got each byte from publish, and B had it before")
            timeline.tell("a", f"published {name}: {copied // MIB} MiB copied to C, {took} with the rename")
            reload_s = loaded.read_s - began - published_s
            timeline.figures[f"reload {number}"] = loaded.read_s - loaded.told_s
            after = f"{abs(reload_s):.2f} s {'after' if reload_s > 0 else 'before'} publish returned"
            timeline.tell("c", f"read it in {loaded.read_s - loaded.told_s:.2f} s, done {after}")
    finally:
        inference.stop()


def seal(players: Cast) -> None:
    timeline, namespace = players.timeline, players.sites.namespace
    timeline.chapter("a dataset of B is sealed, and C keeps it")
    save(players.root("b") / "datasets" / "set", "set", SHARDS, SHARD_BYTES)
    namespace.command("seal", str(players.root("b") / "datasets" / "set"), "--term", "10m")
    there = players.root("c") / "datasets" / "set"
    namespace.command("warm", str(there))
    mountpoint = str(players.mounts["c"].path)

    def trusts() -> bool:
        expect(is_saved(there, "set", SHARDS, SHARD_BYTES), "C reads the dataset")
        return any(one.endswith(f":{mountpoint}") for one in namespace.report("seals", mountpoint)[0]["trusted_by"])

    wait_until(trusts, "C trusts the seal")
    timeline.tell("c", "has all of the dataset and trusts the seal for 10 minutes")


# -- while parts are away --------------------------------------------------------------------------------------------


def stop_the_store(players: Cast) -> None:
    timeline = players.timeline
    timeline.chapter("A's store stops; until the end")
    players.sites.stores["a"].refuse()
    for site in ("c", "b", "a"):
        began = monotonic()
        for step in range(1, STEPS + 1):
            path = players.root(site) / "checkpoints" / f"step-{step}"
            expect(is_saved(path, f"step-{step}", RANKS, RANK_BYTES), f"{site} reads step-{step}")
        took = timeline.measured(f"read without A, {site}", monotonic() - began)
        timeline.tell(site, f"read all {STEPS} checkpoints in {took}")
    late = players.root("a") / "checkpoints" / "late"
    players.late = players.pool.submit(save, late, "late", RANKS, RANK_BYTES)
    timeline.tell("a", "saves one more: its fsync waits for the store")
    took_s = save(players.root("b") / "checkpoints" / "at-b", "at-b", RANKS, RANK_BYTES)
    timeline.tell("b", f"saves one of its own in {timeline.measured('save at b', took_s)}")
    expect(not players.late.done(), "the save at A waits")


def stop_a_member(players: Cast) -> None:
    timeline, leader = players.timeline, players.sites.leader()
    timeline.chapter("the member of etcd that leads is killed; until the end")
    players.stopped.append(leader)
    leader.kill()
    for site in SITES:
        began = monotonic()
        path = players.root(site) / "state" / f"by-{site}"
        path.write_bytes(site.encode())
        os.replace(path, path.with_name(f"done-by-{site}"))
        took = timeline.measured(f"member stopped, {site}", monotonic() - began)
        timeline.tell(site, f"made and renamed a file in {took}")
    for site in SITES:
        found = sorted(os.listdir(players.root(site) / "state"))
        expect(found == [f"done-by-{each}" for each in SITES], f"{site} sees what all have done")
    timeline.tell("", "all three see what each has done")


# -- all is well again -----------------------------------------------------------------------------------------------


def heal(players: Cast) -> None:
    timeline, began = players.timeline, monotonic()
    timeline.chapter("everything comes back")
    for server in players.stopped:
        server.start()
    players.stopped.clear()
    players.sites.heal()
    assert players.late is not None
    players.late.result(WAIT_S)
    timeline.tell("a", "the save that waited is done")
    current = players.root("c") / "state" / "current"

    def reads_the_new() -> bool:
        try:
            return current.read_bytes() == NEW
        except OSError:
            return False

    wait_until(reads_the_new, "C reads what B has written")
    timeline.tell("c", f"reads what B has written, {monotonic() - began:.1f} s after the network came back")
    top = players.root("b") / "checkpoints"
    wait_until(lambda: are_copied(players, top / "late", "b"), "B has a copy of it")
    for site in SITES:
        wait_until(lambda site=site: has_caught_up(players, site), f"the agent of {site} has caught up")  # type: ignore[misc]
    timeline.tell("b", f"backlog 0 and lag 0 at all sites after {timeline.measured('healed', monotonic() - began)}")
    for name in ("late", "at-b"):
        expect(is_saved(players.root("c") / "checkpoints" / name, name, RANKS, RANK_BYTES), f"C reads {name}")
    expect(is_saved(players.root("c") / "datasets" / "set", "set", SHARDS, SHARD_BYTES), "C reads the dataset")
    players.sites.namespace.command("unseal", str(players.root("b") / "datasets" / "set"))


def has_caught_up(players: Cast, site: str) -> bool:
    told = status_of(players.sites.namespace, site)
    return bool(told["backlog"] == 0 and told["lag_s"] == 0)
