"""Journal records: what goes in comes out, and damage is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.metadata import codec, journal
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.journal import Change, Kind, SlotRecord

BASE_NS = 1_700_000_000_000_000_000
numbers = st.integers(0, (1 << 63) - 1)
names = st.binary(max_size=20)
offsets = st.none() | st.integers(-(1 << 62), 1 << 62)
changes = st.builds(
    Change,
    kind=st.sampled_from(sorted(journal.NAMESPACE_KINDS)),
    ino=numbers,
    parent=numbers,
    name=names,
    time_ns=st.integers(1, 1 << 62),
    mode=st.integers(0, 0o177777),
    size_bytes=numbers,
    nlink=st.integers(0, 65_000),
    uid=st.integers(0, (1 << 32) - 1),
    gid=st.integers(0, (1 << 32) - 1),
    body_version=numbers,
    mtime_offset_ns=offsets,
    atime_offset_ns=offsets,
    flags=st.sampled_from([0, 0x10, 0x20, 0x30]),
    old_parent=numbers,
    old_name=names,
    ino2=numbers,
    nlink2=st.integers(0, 65_000),
    rdev=numbers,
    attribute=names,
    value=names,
    term_s=st.integers(0, 1 << 30) | st.floats(0, 1e9),
)


@given(st.lists(changes, max_size=5).map(tuple))
def test_records_come_back(found: tuple[Change, ...]) -> None:
    record = SlotRecord(7, 1, BASE_NS, found)
    assert journal.decode(journal.encode(record)) == record


def test_what_is_no_change_of_the_namespace() -> None:
    for kind in Kind:
        fields = codec.decode_fields(journal.encode(SlotRecord(1, 1, BASE_NS, (Change(kind, ino=5, time_ns=BASE_NS),))))
        assert journal.is_of_namespace(fields) == (kind in journal.NAMESPACE_KINDS)
    assert journal.decode(journal.encode(SlotRecord(1, 1, 0, (Change(Kind.NOTHING),)))).changes == (
        Change(Kind.NOTHING),
    )


@pytest.mark.parametrize(
    "fields",
    [[], [1, 1, 0], [1, 1, 0, [[99]]], [1, 1, 0, [[3, 1]]], [1, 1, 0, [[3, 1 << 40, 5]]], [1, 1, 0, [[3, 1, 5, 6]]]],
)
def test_damage_is_told(fields: list[object]) -> None:
    with pytest.raises(CorruptRecord):
        journal.decode(codec.encode_fields(fields))


def test_a_create_in_a_batch_is_small() -> None:
    """Etcd keeps each record until it is compacted: a field more is felt."""
    ino, parent = 77 << 32 | 123_456, 77 << 32 | 1
    batch = [
        Change(Kind.CREATE, ino + at, parent, b"file%07d" % at, BASE_NS + 100_000 * at, 0o100644, uid=1000, gid=1000)
        for at in range(40)
    ]
    data = journal.encode(SlotRecord(123_456, 1, BASE_NS, tuple(batch)))
    assert len(data) / len(batch) < 55
