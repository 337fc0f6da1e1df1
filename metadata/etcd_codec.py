"""Between the port's dataclasses and etcd's messages.

Requests are built in place (`add`, then set fields): a message that is passed to another's constructor is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from apollofs.metadata.errors import RequestTooLarge, StoreMisuse
from apollofs.metadata.etcdrpc import rpc_pb2 as rpc
from apollofs.metadata.store import (
    REQUEST_BYTES_MAX,
    Compare,
    Event,
    KeyValue,
    Op,
    Put,
    Range,
    RangeResult,
    Target,
    TxnResult,
)

_OPERAND_FIELDS = {
    Target.VERSION: "version",
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VALUE: "value",
    Target.LEASE: "lease",
}
DELETED = rpc.Event.DELETE


def encode_txn(compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op]) -> rpc.TxnRequest:
    """Raises RequestTooLarge past the port's size, StoreMisuse for what the port forbids and etcd would allow."""
    request = rpc.TxnRequest()
    for compare in compares:
        _encode_compare(request.compare.add(), compare)
    for op in then:
        _encode_op(request.success.add(), op)
    for op in orelse:
        _encode_op(request.failure.add(), op)
    size = request.ByteSize()
    if size > REQUEST_BYTES_MAX:
        raise RequestTooLarge(f"a request of {size} bytes is more than {REQUEST_BYTES_MAX}")
    return request


def _encode_compare(message: rpc.Compare, compare: Compare) -> None:
    message.key = compare.key
    # the port's numbers are etcd's; only the generated types don't know it
    message.target = compare.target  # type: ignore[assignment]
    message.result = compare.relation  # type: ignore[assignment]
    setattr(message, _OPERAND_FIELDS[compare.target], compare.operand)
    if compare.range_end:
        message.range_end = compare.range_end


def _encode_op(message: rpc.RequestOp, op: Op) -> None:
    if isinstance(op, Put):
        put = message.request_put
        put.key = op.key
        put.value = op.value
        if op.lease:
            put.lease = op.lease
    elif isinstance(op, Range):
        if op.revision:
            raise StoreMisuse("a read inside a transaction can't name a revision")
        _fill_range(message.request_range, op)
    else:
        delete = message.request_delete_range
        delete.key = op.key
        if op.range_end:
            delete.range_end = op.range_end


def encode_range(request: Range) -> rpc.RangeRequest:
    message = rpc.RangeRequest()
    _fill_range(message, request)
    return message


def _fill_range(message: rpc.RangeRequest, request: Range) -> None:
    message.key = request.key
    if request.range_end:
        message.range_end = request.range_end
    if request.limit:
        message.limit = request.limit
    if request.revision:
        message.revision = request.revision
    if request.keys_only:
        message.keys_only = True
    if request.count_only:
        message.count_only = True


def decode_txn(message: rpc.TxnResponse) -> TxnResult:
    """`ranges` of a transaction carry its revision: within it, etcd reports those before its own writes."""
    revision: int = message.header.revision
    return TxnResult(
        message.succeeded,
        revision,
        tuple(
            decode_range(each.response_range, revision) if each.HasField("response_range") else None
            for each in message.responses
        ),
    )


def decode_range(message: rpc.RangeResponse, revision: int) -> RangeResult:
    return RangeResult(tuple([decode_key_value(kv) for kv in message.kvs]), message.more, message.count, revision)


def decode_key_value(kv: rpc.KeyValue) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def decode_events(messages: Sequence[rpc.Event]) -> list[Event]:
    return [Event(message.type == DELETED, decode_key_value(message.kv)) for message in messages]
