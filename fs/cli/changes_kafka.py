"""`changes --kafka`: the options of the bridge to Kafka, and its run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import click

from apollofs.fs.change_facts import change_json
from apollofs.fs.change_feed import FeedRequest
from apollofs.fs.cli.collecting import parse_age
from apollofs.fs.cli.output import print_json
from apollofs.fs.kafka_settings import read_settings
from apollofs.metadata.changes.groups import check_group
from apollofs.metadata.changes.log import ChangeLog
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.format import read_superblock
from apollofs.metadata.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])
GROUP_PREFIX = "kafka-"
GIVE_UP_S_MIN = 1
GIVE_UP_S_MAX = 600
"""Brokers allow no transaction of more than a quarter of an hour, unless told otherwise."""
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class KafkaOptions:
    """What was asked for."""

    brokers: str
    topic: str
    settings: Mapping[str, str] = field(repr=False)
    give_up_s: float

    async def run(
        self,
        store: Store,
        volume: str,
        changes: ChangeLog,
        request: FeedRequest,
        sites: Mapping[int, str],
        as_json: bool,
    ) -> None:
        """Bridge what is asked for, and say at the end what was sent. Raises UserError, and what `bridge` raises."""
        from apollofs.fs.change_bridge import bridge
        from apollofs.fs.change_kafka import KafkaTarget, open_kafka

        group = request.group or default_group(self.topic)
        # etcds may have volumes of one name, and a volume may be made anew
        name = f"apollofs.{volume}.{group}.{(await read_superblock(store, volume)).uuid}"
        target = KafkaTarget(self.brokers, self.topic, name, self.settings, self.give_up_s)

        def encode(record: ChangeRecord) -> bytes:
            return change_json(record, sites).encode()

        report = await bridge(store, volume, changes, replace(request, group=group), lambda: open_kafka(target, encode))
        facts = {"topic": self.topic, "group": group, "records": report.records, "position": str(report.position)}
        if as_json:
            print_json(facts)
        else:
            click.echo(f"sent {report.records} changes to {self.topic}; the group {group} goes on at {report.position}")


def default_group(topic: str) -> str:
    """Of a bridge that names none. Raises InvalidArgument for a topic that makes no name of a group."""
    group = GROUP_PREFIX + topic
    check_group(group)
    return group


def kafka_options(command: Command) -> Command:
    """Options of the bridge, which the command gets as `kafka`: KafkaOptions, or None without --kafka."""

    @functools.wraps(command)
    def packed(*args: Any, brokers: str, topic: str, kafka_config: str, kafka_timeout: str, **others: Any) -> Any:
        return command(*args, kafka=_options(brokers, topic, kafka_config, kafka_timeout), **others)

    for option in (
        click.option(
            "--kafka-timeout", default="1m", show_default=True, metavar="AGE", help="Give up on brokers after so long."
        ),
        click.option("--kafka-config", default="", metavar="FILE", help="Properties of librdkafka: TLS, SASL."),
        click.option("--topic", default="", metavar="TOPIC", help="Where in Kafka; it must be there."),
        click.option("--kafka", "brokers", default="", metavar="BROKERS", help="Send to Kafka: HOST:PORT,..."),
    ):
        packed = option(packed)
    return packed  # type: ignore[return-value]


def _options(brokers: str, topic: str, kafka_config: str, kafka_timeout: str) -> KafkaOptions | None:
    """Raises click.UsageError, UserError."""
    if not brokers:
        if topic or kafka_config:
            raise click.UsageError("--topic and --kafka-config belong to --kafka")
        return None
    if not topic:
        raise click.UsageError("--kafka needs --topic")
    if not _TOPIC.fullmatch(topic):
        raise click.UsageError(f"{topic!r} is no topic of Kafka")
    try:
        import apollofs.fs.change_kafka  # noqa: F401
    except ModuleNotFoundError as exc:
        if exc.name != "confluent_kafka":
            raise
        raise click.UsageError("--kafka needs a client library: pip install 'apollofs[kafka]'") from exc
    settings = read_settings(kafka_config) if kafka_config else {}
    give_up_s = parse_age(kafka_timeout)
    if not GIVE_UP_S_MIN <= give_up_s <= GIVE_UP_S_MAX:
        raise click.UsageError(f"--kafka-timeout must be from {GIVE_UP_S_MIN} s to {GIVE_UP_S_MAX // 60}m")
    return KafkaOptions(brokers, topic, settings, give_up_s)
