"""`apollofs changes --kafka` on a real broker: whatever dies, each change is there exactly once, in order by inode."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs.change_kafka import KafkaTarget, open_kafka
from apollofs.fs.embedded import free_ports
from apollofs.fs.user_error import UserError
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.journal import Change, Kind
from tests.faults.dying_bridge import STEPS
from tests.faults.kafka_bridges import Place, started
from tests.mounted.harness import HarnessError, LocalBodies, Mount, Namespace
from tests.support.kafka_server import PASSWORD, USER, KafkaBroker

pytestmark = [pytest.mark.faults, pytest.mark.mounted, pytest.mark.slow]
NUMBERS = itertools.count(1)
PARTITIONS = 3


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    with KafkaBroker.started(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with Namespace.made(tmp_path_factory.mktemp("volume"), [LocalBodies("west")]) as namespace:
        yield namespace.mount("west")


@pytest.fixture
def place(mount: Mount, broker: KafkaBroker) -> Place:
    topic = f"topic-{next(NUMBERS)}"
    broker.create_topic(topic, PARTITIONS)
    (mount.path / topic).mkdir()
    return Place(mount.namespace, mount, broker, topic)


def names(count: int, first: int = 0) -> list[str]:
    return [f"f{number}" for number in range(first, first + count)]


# -- what is sent


def test_a_message_is_a_record(place: Place) -> None:
    place.make(*names(20))
    told = place.told()
    report = place.sent()
    assert (report["records"], report["group"]) == (len(told), f"kafka-{place.topic}")
    assert place.arrived() == told
    assert len({message.partition for message in place.broker.messages(place.topic)}) == PARTITIONS
    # another run has nothing to send, and what comes then is sent alone
    assert place.sent()["records"] == 0
    (place.root / "f0").rename(place.root / "renamed")
    place.make("more")
    assert place.sent()["records"] == len(place.told()) - len(told)
    assert place.arrived() == place.told()


def test_groups_have_positions_of_their_own(place: Place) -> None:
    place.make("a")
    now = place.sent("--group", place.topic, "--from", "now")
    assert now["records"] == 0
    place.make("b")
    assert place.sent("--group", place.topic)["records"] == 2  # create, commit
    groups = {each["name"]: each for each in place.namespace.report("changes", "status", place.namespace.url)["groups"]}
    assert groups[place.topic]["position"] > now["position"]
    # a group that was forgotten begins anew, though Kafka has a position of it
    place.namespace.command("changes", "forget", place.namespace.url, place.topic)
    assert place.sent("--group", place.topic)["records"] == len(place.told())


# -- deaths


def test_a_bridge_that_dies_at_any_step_sends_everything_once(place: Place) -> None:
    place.make(*names(100))
    for step, number in (*zip(STEPS, (1, 2, 3), strict=True), ("delivered", 1)):
        with started(place, step=step, number=number) as bridge:
            assert bridge.ended() == (-signal.SIGKILL, "")
    assert place.sent()["records"] > 0
    assert place.arrived() == place.told()


def test_a_bridge_is_killed_while_it_follows(place: Place) -> None:
    for number in range(3):
        with started(place, "--follow") as bridge:
            place.make(*names(40, 100 * number))
            place.await_arrived(f"f{100 * number}")
            place.make(*names(40, 100 * number + 50))
            bridge.process.kill()
            assert bridge.ended() == (-signal.SIGKILL, "")
    place.sent()
    assert place.arrived() == place.told()


def test_an_interrupted_bridge_ends_and_goes_on(place: Place) -> None:
    place.make("a")
    with started(place, "--follow") as bridge:
        place.await_arrived("a")
        assert bridge.interrupt() == (130, "apollofs: interrupted; nothing more was done\n")
    assert place.sent()["records"] == 0
    assert place.arrived() == place.told()


def test_a_frozen_bridge_is_replaced(place: Place) -> None:
    place.make("a")
    with started(place, "--follow") as frozen:
        place.await_arrived("a")
        frozen.await_frozen()
        place.make(*names(40))
        with started(place) as second:
            assert second.ended()[0] == 0
        frozen.process.send_signal(signal.SIGCONT)
        status, said = frozen.ended()
        assert (status, said.count("\n")) == (1, 1), said
    assert place.arrived() == place.told()


async def test_a_replaced_bridge_commits_nothing(place: Place) -> None:
    """Though etcd has not told it yet."""
    target = KafkaTarget(place.broker.address, place.topic, f"bridge-{place.topic}")
    record = ChangeRecord(Position(4, 1), 1, 1, Change(Kind.MKDIR, ino=7), b"/", None)

    def encode(record: ChangeRecord) -> bytes:
        return str(record.position).encode()

    async with open_kafka(target, encode) as first:
        assert first.position is None
        await first.send([record], Position(5))
        async with open_kafka(target, encode) as second:
            assert second.position == Position(5)
            with pytest.raises(UserError, match="another bridge of this group"):
                await first.send([record._replace(position=Position(5))], Position(6))
            await second.send([record._replace(position=Position(5, 3))], Position(7))
    async with open_kafka(target, encode) as third:
        assert third.position == Position(7)
    assert [message.value for message in place.broker.messages(place.topic)] == [b"4.1", b"5.3"]


def test_the_broker_dies_and_comes_back(place: Place) -> None:
    place.make("a")
    with started(place, "--follow", "--kafka-timeout", "10m") as bridge:
        place.await_arrived("a")
        place.broker.kill()
        place.make(*names(40))
        place.broker.start()
        place.await_arrived("f39")
        assert bridge.interrupt()[0] == 130
    place.sent()
    assert place.arrived() == place.told()


# -- what can't work


def test_no_broker(place: Place) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(
        HarnessError, match=r"status 1: apollofs: Kafka at .*: given up after 2 s: .*Connection refused"
    ):
        place.namespace.command(*place.words("--kafka-timeout", "2", address=address))


def test_a_broker_that_does_not_answer(place: Place) -> None:
    place.make("a")
    with started(place, "--follow", "--kafka-timeout", "8") as bridge:
        place.await_arrived("a")
        with place.broker.paused():
            place.make("b")
            status, said = bridge.ended()
    assert (status, said.count("\n")) == (1, 1), said
    assert "given up after 8 s" in said
    place.sent()
    assert place.arrived() == place.told()


def test_an_interrupt_while_no_broker_answers(place: Place) -> None:
    place.make("a")
    with started(place, "--follow", "--kafka-timeout", "10m") as bridge:
        place.await_arrived("a")
        with place.broker.paused():
            place.make("b")
            status, said = bridge.interrupt()
    assert status == 130, said
    place.sent()
    assert place.arrived() == place.told()


def test_a_topic_that_is_not_there(place: Place) -> None:
    with pytest.raises(HarnessError, match="has no topic 'missing': create it first"):
        place.namespace.command(*place.words("--topic", "missing"))


# -- TLS and passwords


def settings_file(place: Place, directory: Path, **changed: str) -> str:
    """For the broker's secured port."""
    values = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": USER,
        "sasl.password": PASSWORD,
        "ssl.ca.location": place.broker.certificates.ca,
    }
    values.update((name.replace("_", "."), value) for name, value in changed.items())
    path = directory / "kafka.properties"
    path.write_text("# a comment\n\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    return str(path)


def test_tls_and_a_password(place: Place, tmp_path: Path) -> None:
    place.make("a")
    words = place.words("--kafka-config", settings_file(place, tmp_path), address=place.broker.secured_address)
    assert place.namespace.report(*words)["records"] == len(place.told())
    assert place.arrived() == place.told()


def test_a_wrong_password_is_told_at_once_and_not_shown(place: Place, tmp_path: Path) -> None:
    config = settings_file(place, tmp_path, sasl_password="wrong-secret")
    words = place.words("--kafka-config", config, "--kafka-timeout", "10m", address=place.broker.secured_address)
    with pytest.raises(HarnessError, match="uthentication fail") as caught:
        place.namespace.command(*words)
    assert "wrong-secret" not in str(caught.value)
    assert USER not in str(caught.value)


def test_a_broker_that_is_not_who_it_should_be(place: Place, tmp_path: Path) -> None:
    config = settings_file(place, tmp_path, ssl_ca_location=place.broker.certificates.other_ca)
    words = place.words("--kafka-config", config, "--kafka-timeout", "10m", address=place.broker.secured_address)
    with pytest.raises(HarnessError, match="certificate verify failed"):
        place.namespace.command(*words)
    assert place.arrived() == []
