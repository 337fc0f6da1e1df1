"""A real Kafka broker on loopback, which is its own controller (KRaft): one process, free ports, a small heap.

    with KafkaBroker.started(directory) as broker:
        broker.create_topic("changes", partitions=3)
        ... broker.address ...
        broker.messages("changes")

Data survive `stop`, `kill` and `start`. Every wait is bounded. Needs Java 17 and build/kafka, which scripts/test bring.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from apollofs.fs.embedded import free_ports
from tests.support.certificates import Certificates
from tests.support.etcd_server import wait_until
from tests.support.server_process import ServerProcess

HOST = "127.0.0.1"
JARS = Path(__file__).parents[2] / "build" / "kafka"
START_TIMEOUT_S = 120.0
ANSWER_S = 60.0
ARRIVAL_S = 120.0
CLUSTER_ID = "apollofs-test-clusterA"
"""22 characters, as 16 bytes in base64 have."""
USER, PASSWORD = "bridge", "a-secret-of-the-test"
JAVA = "java -Xms64m -Xmx320m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.awt.headless=true"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{plain},SASL_SSL://{host}:{secured},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{plain},SASL_SSL://{host}:{secured}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_{user}="{password}";
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
log.cleaner.dedupe.buffer.size=4194304
num.network.threads=2
num.io.threads=4
"""


class KafkaServerError(Exception):
    """The broker did not come up, or did not do what a test asked of it."""


@dataclass(frozen=True, slots=True)
class KafkaMessage:
    key: bytes
    value: bytes
    partition: int


class KafkaBroker(ServerProcess):
    """One broker."""

    stop_timeout_s = 30.0

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.certificates = Certificates.made(directory / "tls")
        self.plain, self.secured, self._controller = free_ports(3)

    @classmethod
    @contextmanager
    def started(cls, directory: Path) -> Iterator[KafkaBroker]:
        """A new broker, gone with its directory at the end of the block."""
        broker = cls(directory)
        try:
            broker._format()
            broker.start()
            yield broker
        finally:
            broker.kill()
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def address(self) -> str:
        """For clients without TLS, who may do all."""
        return f"{HOST}:{self.plain}"

    @property
    def secured_address(self) -> str:
        """For clients with TLS, and USER's PASSWORD."""
        return f"{HOST}:{self.secured}"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start with the data of last time; returns when it answers."""
        assert self._process is None, "it runs"
        self._process = self._java("kafka.Kafka", str(self._properties))
        wait_until(self._answers_or_dead, "the Kafka broker", START_TIMEOUT_S)
        if self._process.poll() is not None:
            raise KafkaServerError(f"the Kafka broker has ended: {self.log[-3000:]}")

    def create_topic(self, name: str, partitions: int = 1) -> None:
        admin = AdminClient({"bootstrap.servers": self.address})
        made = admin.create_topics([NewTopic(name, partitions, 1)], operation_timeout=ANSWER_S)
        made[name].result(ANSWER_S)

    def messages(self, topic: str) -> list[KafkaMessage]:
        """All that is committed in a topic; each partition in order."""
        with self._consumer(topic) as (consumer, partitions):
            return list(_until_ends(consumer, partitions))

    def await_message(self, topic: str, wanted: Callable[[KafkaMessage], bool]) -> None:
        """Until such a one is committed. Raises KafkaServerError after ARRIVAL_S."""
        deadline = time.monotonic() + ARRIVAL_S
        with self._consumer(topic) as (consumer, _):
            while True:
                found = consumer.poll(1.0)
                if found is not None and found.error() is None and wanted(_plain(found)):
                    return
                if time.monotonic() > deadline:
                    raise KafkaServerError(f"what was to come to {topic} has not come")

    @contextmanager
    def _consumer(self, topic: str) -> Iterator[tuple[Consumer, int]]:
        """One that reads a topic from its beginning; and how many partitions it has."""
        options = {"group.id": "of-the-test", "enable.auto.commit": False, "enable.partition.eof": True}
        consumer = Consumer({"bootstrap.servers": self.address, "log_level": 0, **options})
        try:
            partitions = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic].partitions
            consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
            yield consumer, len(partitions)
        finally:
            consumer.close()

    @property
    def _properties(self) -> Path:
        return self.directory / "server.properties"

    def _format(self) -> None:
        """Write the configuration, and make the directory of the data."""
        keystore = self.directory / "keystore.pem"
        keystore.write_text("".join(Path(part).read_text() for part in self._key_and_chain()))
        values = {"host": HOST, "plain": self.plain, "secured": self.secured, "controller": self._controller}
        secrets = {"user": USER, "password": PASSWORD, "keystore": keystore, "data": self.directory / "data"}
        self._properties.write_text(_PROPERTIES.format(**values, **secrets))
        words = ("format", "--cluster-id", CLUSTER_ID, "--config", str(self._properties))
        process = self._java("kafka.tools.StorageTool", *words)
        try:
            status = process.wait(START_TIMEOUT_S)
        finally:
            process.kill()
        if status != 0:
            raise KafkaServerError(f"the Kafka broker's data could not be made: {self.log[-3000:]}")

    def _key_and_chain(self) -> tuple[str, ...]:
        return self.certificates.server_key, self.certificates.server_cert, self.certificates.ca

    def _java(self, *words: str) -> subprocess.Popen[bytes]:
        if shutil.which("java") is None or not JARS.is_dir():
            raise KafkaServerError("the Kafka server is missing: scripts/test installs it")
        with (self.directory / "log").open("ab") as log:
            command = [*JAVA.split(), "-cp", f"{JARS}/*", *words]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ))

    def _answers_or_dead(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            return True
        try:
            socket.create_connection((HOST, self.plain), timeout=5).close()
        except OSError:
            return False
        return True


def _plain(message: Message) -> KafkaMessage:
    return KafkaMessage(message.key() or b"", message.value() or b"", message.partition() or 0)


def _until_ends(consumer: Consumer, partitions: int) -> Iterator[KafkaMessage]:
    """What an assigned consumer gets until it has come to the end of so many partitions."""
    while partitions:
        message = consumer.poll(ANSWER_S)
        if message is None:
            raise KafkaServerError(f"nothing from the broker within {ANSWER_S:g} s")
        error = message.error()
        if error is None:
            yield _plain(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            partitions -= 1
        else:
            raise KafkaServerError(str(error))
