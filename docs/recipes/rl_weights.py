"""Online reinforcement learning: a trainer publishes weights, inference loads them the moment they are there.

usage: rl_weights.py TRAINER_DIRECTORY SAME_DIRECTORY_ON_ANOTHER_MOUNT SITES [ROUNDS] [MIB]

SITES, with commas between them, get every body before the weights can be seen. Needs the command `apollofs`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

SHARDS = 4
KEEP = 2


def save(directory: str, mib: int) -> None:
    """Shards of weights, and a list of their checksums; durable on return."""
    os.mkdir(directory)
    sums = {}
    for shard in range(SHARDS):
        data = os.urandom(mib * 2**20 // SHARDS)
        sums[f"shard-{shard}"] = hashlib.blake2b(data).hexdigest()
        write(f"{directory}/shard-{shard}", data)
    write(f"{directory}/index.json", json.dumps(sums).encode())


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def published(directory: str) -> Iterator[str]:
    """The names of the steps that become visible, as the change log tells of them."""
    command = ["apollofs", "changes", directory, "--from", "beginning", "--follow", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as feed:
        assert feed.stdout is not None
        try:
            for line in feed.stdout:
                change = json.loads(line)
                if change["kind"] == "rename" and change["name"].startswith("step-"):
                    yield change["name"]
        finally:
            feed.terminate()


def load(directory: str) -> int:
    """Map every shard and look at all of it; how many bytes. The directory is whole, or it could not be seen."""
    with open(f"{directory}/index.json") as file:
        sums: dict[str, str] = json.load(file)
    size = 0
    for name, expected in sums.items():
        with (
            open(f"{directory}/{name}", "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as weights,
        ):
            assert hashlib.blake2b(weights).hexdigest() == expected, f"{directory}/{name} is damaged"
            size += len(weights)
    return size


def train(directory: str, sites: str, rounds: int, mib: int) -> None:
    for step in range(1, rounds + 1):
        began = time.time()
        save(f"{directory}/.step-{step}", mib)
        saved = time.time()
        finished = f"{directory}/step-{step}"
        subprocess.run(["apollofs", "publish", f"{directory}/.step-{step}", finished, "--sites", sites], check=True)
        print(f"step {step}: saved in {saved - began:.2f} s, published in {time.time() - saved:.2f} s", flush=True)
        if step > KEEP:
            # who has it open or mapped keeps it
            shutil.rmtree(f"{directory}/step-{step - KEEP}")


def main() -> None:
    here, there, sites = sys.argv[1:4]
    rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 5
    mib = int(sys.argv[5]) if len(sys.argv) > 5 else 64
    feed = published(there)
    trainer = os.fork()
    if trainer == 0:
        train(here, sites, rounds, mib)
        os._exit(0)
    for _ in range(rounds):
        name = next(feed)
        seen = time.time()
        size = load(f"{there}/{name}")
        print(f"  {name}: {size >> 20} MiB loaded {time.time() - seen:.2f} s after it was told", flush=True)
    feed.close()
    assert os.waitpid(trainer, 0)[1] == 0


if __name__ == "__main__":
    main()
