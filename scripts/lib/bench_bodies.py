"""What a benchmark of bodies does: a checkpoint saved and loaded through a mount, and the same bytes without one."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import obstore
from obstore.store import S3Store

GB = 10**9
PIECE_BYTES = 4 << 20
OBJECT_BYTES = 16 << 20
AT_ONCE = 8
HEAD_BYTES = 16


@dataclass(frozen=True)
class Bucket:
    """Where a client without apollofs reads and writes."""

    endpoint: str
    name: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Cost:
    """So many bytes moved: how fast, and what it cost the client or the daemon, in core-seconds a GB (10^9 bytes)."""

    mb_per_second: float
    core_s_per_gb: float

    @classmethod
    def of(cls, size_bytes: int, took_s: float, processor_s: float) -> Cost:
        return cls(size_bytes / took_s / 1e6, processor_s / size_bytes * GB)


# -- a checkpoint: pieces that differ in their first bytes, so that nothing can be mistaken for another ---------------


def save(path: str, size: int) -> None:
    """As a checkpoint is saved: a temporary name, fsync, rename."""
    body = bytearray(_pool())
    fd = os.open(f"{path}.tmp", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        for at in range(0, size, PIECE_BYTES):
            body[:HEAD_BYTES] = _head(path, at)
            os.write(fd, memoryview(body)[: min(PIECE_BYTES, size - at)])
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(f"{path}.tmp", path)


def load(path: str) -> int:
    """Read and compared from the first byte to the last; how many. Raises RuntimeError if one is wrong."""
    body, piece, size = _pool(), bytearray(PIECE_BYTES), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            at = size % PIECE_BYTES
            found = memoryview(piece)[:count]
            if at == 0:
                right = found[:HEAD_BYTES] == _head(path, size)[:count]
                right &= found[HEAD_BYTES:] == memoryview(body)[HEAD_BYTES:count]
            else:
                right = found == memoryview(body)[at : at + count]
            if not right:
                raise RuntimeError(f"{path}: not what was saved, from byte {size} on")
            size += count
    return size


def _pool() -> bytes:
    return random.Random(1).randbytes(PIECE_BYTES)


def _head(path: str, at: int) -> bytes:
    return b"%-8.8s%8d" % (os.path.basename(path).encode(), at // PIECE_BYTES)


# -- the same without a mount -----------------------------------------------------------------------------------------


def raw_costs(bucket: Bucket, size: int) -> tuple[Cost, Cost]:
    """PUT and GET of `size` bytes by a bare obstore client, in a process of its own: it has the threads to itself."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_raw_costs, bucket, max(1, size // OBJECT_BYTES)).result()


def raw_copy_cost(source: Bucket, target: Bucket, size: int) -> Cost:
    """The same, of `size` bytes that are got from one bucket and put into another."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_raw_copy_cost, source, target, max(1, size // OBJECT_BYTES)).result()


def _raw_costs(bucket: Bucket, count: int) -> tuple[Cost, Cost]:
    store = _store(bucket)
    data = os.urandom(OBJECT_BYTES)
    put = _measured(count, lambda number: obstore.put(store, f"raw/{number}", data, use_multipart=False))
    get = _measured(count, lambda number: len(obstore.get(store, f"raw/{number}").bytes()))
    obstore.delete(store, [f"raw/{number}" for number in range(count)])
    return put, get


def _raw_copy_cost(source: Bucket, target: Bucket, count: int) -> Cost:
    stores, data = (_store(source), _store(target)), os.urandom(OBJECT_BYTES)
    names = [f"copied/{number}" for number in range(count)]
    for name in names:
        obstore.put(stores[0], name, data, use_multipart=False)

    def copy(number: int) -> None:
        body = obstore.get(stores[0], names[number]).bytes()
        obstore.put(stores[1], names[number], body, use_multipart=False)

    cost = _measured(count, copy)
    for store in stores:
        obstore.delete(store, names)
    return cost


def _store(bucket: Bucket) -> S3Store:
    return S3Store(
        bucket.name,
        endpoint=bucket.endpoint,
        access_key_id=bucket.access_key,
        secret_access_key=bucket.secret_key,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def _measured(count: int, call: Callable[[int], object]) -> Cost:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        began, before = time.perf_counter(), _own_processor_s()
        for _ in threads.map(call, range(count)):
            pass
        return Cost.of(count * OBJECT_BYTES, time.perf_counter() - began, _own_processor_s() - before)


def _own_processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def other_process() -> Iterator[ProcessPoolExecutor]:
    """Where something is done while this process looks on."""
    with ProcessPoolExecutor(1) as pool:
        yield pool
