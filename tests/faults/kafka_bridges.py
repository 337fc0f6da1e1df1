"""The bridge to Kafka for tests: a place of its own in a volume, a topic of its own, and what has come there."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollofs.metadata.changes.position import Position, parse_position
from tests.mounted.harness import COMMAND_DEADLINE_S, ROOT, Mount, Namespace
from tests.support.kafka_server import KafkaBroker, KafkaMessage

NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Place:
    """One directory, and the topic that its changes go to."""

    namespace: Namespace
    mount: Mount
    broker: KafkaBroker
    topic: str
    """The directory's name, too."""

    @property
    def root(self) -> Path:
        return self.mount.path / self.topic

    def make(self, *names: str) -> None:
        """Files in it, whose records are in etcd then."""
        for name in names:
            (self.root / name).write_bytes(name.encode())
        fd = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def words(self, *more: str, address: str = "") -> tuple[str, ...]:
        target = ("--kafka", address or self.broker.address, "--topic", self.topic)
        return ("changes", self.namespace.url, f"/{self.topic}", *target, *more)

    def sent(self, *more: str) -> dict[str, Any]:
        """Bridge up to now; what it reports."""
        found: dict[str, Any] = self.namespace.report(*self.words(*more))
        return found

    def told(self) -> list[dict[str, Any]]:
        """What `changes --json` prints."""
        lines = self.namespace.command("changes", self.namespace.url, f"/{self.topic}", "--json").splitlines()
        return [json.loads(line) for line in lines]

    def arrived(self) -> list[dict[str, Any]]:
        """What consumers of committed messages have, in the order of positions. The order in each partition is looked
        at, and that all messages of an inode are in one.
        """
        messages = self.broker.messages(self.topic)
        partitions: dict[bytes, int] = {}
        last: dict[int, Position] = {}
        for message in messages:
            facts = json.loads(message.value)
            assert message.key == str(facts["ino"]).encode()
            assert partitions.setdefault(message.key, message.partition) == message.partition
            assert last.get(message.partition, Position(0)) < position(message)
            last[message.partition] = position(message)
        return [json.loads(message.value) for message in sorted(messages, key=position)]

    def await_arrived(self, name: str) -> None:
        """Until the file `name` has been told."""
        self.broker.await_message(self.topic, lambda message: bool(json.loads(message.value)["name"] == name))


def position(message: KafkaMessage) -> Position:
    return parse_position(json.loads(message.value)["position"])


@dataclass
class Bridge:
    """One in the background, its output in a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def ended(self) -> tuple[int, str]:
        """Wait for its end: status and what it said."""
        return self.process.wait(COMMAND_DEADLINE_S), self.output.read_text()

    def interrupt(self) -> tuple[int, str]:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def await_frozen(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)


@contextmanager
def started(place: Place, *words: str, step: str = "never", number: int = 0) -> Iterator[Bridge]:
    """A bridge of tests/faults/dying_bridge.py."""
    output = place.namespace.directory / f"{place.topic}-{next(NUMBERS)}.out"
    command = [sys.executable, "-m", "tests.faults.dying_bridge", step, str(number), *place.words(*words)]
    with output.open("wb") as out:
        # an interrupt reaches it even where the tests run in the background of a shell
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=place.namespace.environment(),
            cwd=ROOT,
            preexec_fn=_hear_interrupts,
        )
    try:
        yield Bridge(process, output)
    finally:
        process.kill()
        process.send_signal(signal.SIGCONT)
        process.wait(COMMAND_DEADLINE_S)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
