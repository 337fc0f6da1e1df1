"""Kafka as the sink of the bridge, by librdkafka's transactional producer. The only place that knows confluent_kafka,
which comes with an extra: who imports this module says what to install.

Rules
1. The position is a message in a topic of the bridge's own, which is compacted, in the transaction of the messages.
   (Not an offset of a Kafka group: that is forgotten some days after the last one, and librdkafka 2.16 may send it to a
   broker that it has given up, and wait for long.)
2. `transactional.id` is the bridge's name, and the name of its topic. Opening it ends an open transaction of a bridge
   before, waits until one that was being committed is, and fences that bridge. Only then is the position read.
3. People make the topic for the messages: nobody would read from one that is misspelt.
4. What can be retried is, for `give_up_s`; a transaction that failed is aborted and sent again as a whole. librdkafka
   blocks, so it is called in a thread, a slice of time after the other, and asks between them whether it is cancelled.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from apollofs.fs.user_error import UserError
from apollofs.metadata.changes.position import Position, parse_position
from apollofs.metadata.changes.record import ChangeRecord

T = TypeVar("T")
log = logging.getLogger(__name__)
SLICE_S = 0.3
"""A cancelled bridge waits so long at most for a call to come back."""
PAUSE_S = 0.05
"""Before a call that failed at once is made again."""
AGAIN_S = 0.5
"""Before a transaction that has failed is sent again."""
POLL_S = 1.0
REQUEST_S = 10.0
"""A request that was not answered for so long is made again."""
TRANSACTION_MORE_S = 10.0
"""The broker gives up an open transaction so long after the bridge would have."""
FENCED = ("_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH")
REFUSALS = ("_AUTHENTICATION", "_SSL")
PASSING = ("_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_WAIT_COORD")
"""Errors that pass, though librdkafka does not call them retriable where they come from a consumer."""

POSITIONS = {"cleanup.policy": "compact", "segment.bytes": str(4 << 20)}
"""Of the topic with the position: what is read when a bridge opens stays small."""
POSITION_KEY = b"position"
POSITIONS_AT_ONCE = 1000

Encode = Callable[[ChangeRecord], bytes]


@dataclass(frozen=True, slots=True)
class KafkaTarget:
    """Where messages go."""

    brokers: str
    """HOST:PORT,..."""
    topic: str
    name: str
    """The bridge's, in Kafka: `transactional.id`, and the topic with its position."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    """More of librdkafka's properties; they may hold credentials."""
    give_up_s: float = 60.0
    """At most 10 minutes: brokers allow no transaction of more than 15."""


class KafkaSink:
    """Made by `open_kafka`. Implements `change_bridge.Sink`."""

    def __init__(self, transactions: _Transactions, encode: Encode) -> None:
        self._transactions = transactions
        self._encode = encode

    @property
    def position(self) -> Position | None:
        return self._transactions.position

    async def send(self, records: Sequence[ChangeRecord], after: Position) -> None:
        """One transaction. The key of a message is the inode's number, in decimal.

        Raises UserError: nobody answers, this bridge was replaced, or the brokers refuse it. Cancelled it is aborted,
        unless it is being committed just then.
        """

        def work() -> None:
            messages = [(b"%d" % record.change.ino, self._encode(record)) for record in records]
            self._transactions.send(messages, after)

        await trio.to_thread.run_sync(work)


@asynccontextmanager
async def open_kafka(target: KafkaTarget, encode: Encode) -> AsyncIterator[KafkaSink]:
    """A sink for the length of the block: what a bridge of this name before it had begun is ended.

    Raises UserError.
    """
    transactions = await trio.to_thread.run_sync(_Transactions, target)
    await trio.to_thread.run_sync(transactions.open)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transactions.keep_polling)
        yield KafkaSink(transactions, encode)
        nursery.cancel_scope.cancel()


class _Transactions:
    """The blocking side; but for `keep_polling` for one thread of trio's at a time."""

    def __init__(self, target: KafkaTarget) -> None:
        """Waits for nobody yet. Raises UserError for settings that librdkafka refuses."""
        self.position: Position | None = None
        self._target = target
        self._opening = True
        self._last_error = ""
        self._refused = ""
        """Set while opening, by what will not be otherwise at the next try."""
        milliseconds = int(1000 * (target.give_up_s + TRANSACTION_MORE_S))
        shared: dict[str, Any] = {
            # what a user's file may set otherwise
            "socket.timeout.ms": int(1000 * REQUEST_S),
            "client.id": "apollofs",
            **target.settings,
            "bootstrap.servers": target.brokers,
            "error_cb": self._heard,
            "logger": _Quiet(),
        }
        produces = {
            # the partition that producers in Java choose for the same key
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            **shared,
            "transactional.id": target.name,
            "transaction.timeout.ms": milliseconds,
            "message.timeout.ms": milliseconds,
        }
        self._shared = shared
        try:
            self._producer: Producer = Producer(produces)
        except KafkaException as exc:
            raise UserError(f"Kafka's client refuses its settings: {_without_values(exc.args[0].str())}") from None

    def open(self) -> None:
        """Rule 2. Raises UserError, trio.Cancelled."""
        deadline = time.monotonic() + self._target.give_up_s
        options = {"group.id": self._target.name, "enable.auto.commit": False, "enable.partition.eof": True}
        consumer = Consumer({**self._shared, **options, "isolation.level": "read_committed"})
        try:
            if not self._has_topic(consumer, self._target.topic, deadline):
                raise UserError(f"Kafka at {self._target.brokers} has no topic {self._target.topic!r}: create it first")
            self._retried(lambda: self._producer.init_transactions(SLICE_S), deadline)
            while not self._has_topic(consumer, self._target.name, deadline):
                self._make_topic(deadline)
            self._read_position(consumer, deadline)
        finally:
            consumer.close()
        self._opening = False

    def send(self, messages: Sequence[tuple[bytes, bytes]], after: Position) -> None:
        """Raises UserError, trio.Cancelled."""
        deadline = time.monotonic() + self._target.give_up_s
        while True:
            try:
                return self._try(messages, after, deadline)
            except _Aborted as exc:
                if time.monotonic() > deadline:
                    raise self._explained(exc.error) from None
                log.debug("a transaction is sent again: %s", exc)
            self._check(deadline)
            self._producer.poll(AGAIN_S)

    async def keep_polling(self) -> None:
        """What librdkafka has to say is taken from it, or it would keep it all."""
        while True:
            self._producer.poll(0)
            await trio.sleep(POLL_S)

    def _try(self, messages: Sequence[tuple[bytes, bytes]], after: Position, deadline: float) -> None:
        """One transaction, once. Raises _Aborted, UserError, trio.Cancelled; it is aborted, then."""
        try:
            self._retried(self._producer.begin_transaction, deadline)
            for key, value in messages:
                self._produce(self._target.topic, key, value, deadline)
            self._produce(self._target.name, POSITION_KEY, str(after).encode(), deadline)
            while self._retried(lambda: self._producer.flush(SLICE_S), deadline):
                self._check(deadline)
            self._retried(lambda: self._producer.commit_transaction(SLICE_S), deadline)
        except (_Aborted, UserError, trio.Cancelled, KeyboardInterrupt) as exc:
            self._abort(deadline if isinstance(exc, _Aborted) else 0)
            raise

    def _produce(self, topic: str, key: bytes, value: bytes, deadline: float) -> None:
        while True:
            try:
                return self._retried(lambda: self._producer.produce(topic, value, key), deadline)
            except BufferError:
                self._check(deadline)
                self._producer.poll(SLICE_S)

    def _abort(self, deadline: float) -> None:
        """Or those who read committed messages wait until the broker does it. One slice only for who gives up."""
        try:
            if deadline:
                self._retried(lambda: self._producer.abort_transaction(SLICE_S), deadline)
            else:
                self._producer.abort_transaction(SLICE_S)
        except KafkaException as exc:
            log.debug("a transaction could not be aborted: %s", exc)

    def _retried(self, call: Callable[[], T], deadline: float) -> T:
        """Again until it works. Raises _Aborted if the transaction has failed, UserError, trio.Cancelled."""
        while True:
            try:
                return call()
            except KafkaException as exc:
                error: KafkaError = exc.args[0]
            if error.txn_requires_abort():
                raise _Aborted(error)
            if error.fatal() or not (error.retriable() or error.name() in PASSING):
                raise self._explained(error)
            self._check(deadline)
            self._producer.poll(PAUSE_S)

    def _check(self, deadline: float) -> None:
        """Between two slices. Raises UserError when it is time to give up, trio.Cancelled or KeyboardInterrupt as trio
        would in the task that waits for this thread."""
        trio.from_thread.check_cancelled()
        if self._refused:
            raise UserError(f"Kafka at {self._target.brokers}: {self._refused}")
        if time.monotonic() > deadline:
            reason = f": {self._last_error}" if self._last_error else ""
            raise UserError(f"Kafka at {self._target.brokers}: given up after {self._target.give_up_s:g} s{reason}")

    # -- opening -----------------------------------------------------------------------------------------------------

    def _has_topic(self, consumer: Consumer, name: str, deadline: float) -> bool:
        while True:
            topics = self._retried(lambda: consumer.list_topics(name, timeout=SLICE_S), deadline).topics
            error = topics[name].error
            if error is None:
                return True
            if error.name() == "UNKNOWN_TOPIC_OR_PART":
                return False
            if not error.retriable():
                raise self._explained(error)
            self._check(deadline)

    def _make_topic(self, deadline: float) -> None:
        """The one for positions, with as many replicas as the brokers give by default; it may turn out to be there."""
        admin = AdminClient(self._shared)
        making = admin.create_topics([NewTopic(self._target.name, 1, -1, config=POSITIONS)])[self._target.name]
        while not making.done():
            self._check(deadline)
            self._producer.poll(PAUSE_S)
        failed = making.exception()
        if isinstance(failed, KafkaException) and failed.args[0].name() != "TOPIC_ALREADY_EXISTS":
            raise self._explained(failed.args[0])

    def _read_position(self, consumer: Consumer, deadline: float) -> None:
        """The last one. Nobody else writes there, and nothing of it is undecided: the end is the end."""
        consumer.assign([TopicPartition(self._target.name, 0, OFFSET_BEGINNING)])
        while True:
            for message in consumer.consume(POSITIONS_AT_ONCE, SLICE_S):
                error = message.error()
                if error is None:
                    self.position = parse_position((message.value() or b"").decode())
                elif error.name() == "_PARTITION_EOF":
                    return
                elif not (error.retriable() or error.name() in PASSING):
                    raise self._explained(error)
            self._check(deadline)

    # -- errors ------------------------------------------------------------------------------------------------------

    def _heard(self, error: KafkaError) -> None:
        """Called by librdkafka, in whatever thread polls."""
        if error.name() != "_ALL_BROKERS_DOWN":
            self._last_error = error.str()
        if error.name() in REFUSALS and self._opening:
            self._refused = error.str()

    def _explained(self, error: KafkaError) -> UserError:
        if error.name() in FENCED:
            return UserError(f"another bridge of this group writes to Kafka by now (as {self._target.name})")
        return UserError(f"Kafka at {self._target.brokers}: {error.str()}")


class _Aborted(Exception):
    """The transaction has failed, and must be aborted."""

    def __init__(self, error: KafkaError) -> None:
        super().__init__(error.str())
        self.error = error


class _Quiet:
    """librdkafka's log: it tells of every connection that fails, which our own error says once."""

    def log(self, level: int, text: str, *values: object) -> None:
        log.debug(text, *values)


def _without_values(text: str) -> str:
    """A message about settings, without what they were set to: somebody may have mistaken a line for another."""
    return re.sub(r'value "[^"]*"', "value", text)
