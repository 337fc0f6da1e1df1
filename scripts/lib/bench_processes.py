"""Calls on many paths, in this process or in several that start together, and how long they took."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import time
from collections.abc import Callable, Sequence

Call = Callable[[str], object]


def create(path: str) -> None:
    """A new, empty file."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def each(call: Call, paths: Sequence[str]) -> float:
    """Seconds that `call` took for all paths, one after the other."""
    began = time.perf_counter()
    for path in paths:
        call(path)
    return time.perf_counter() - began


def fan(call: Call, shares: Sequence[Sequence[str]]) -> float:
    """A process for each share of paths: seconds from the start of all to the end of the last. Raises RuntimeError."""
    gate = multiprocessing.Barrier(len(shares) + 1)
    processes = [multiprocessing.Process(target=_worker, args=(gate, call, share)) for share in shares]
    for process in processes:
        process.start()
    gate.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a worker of the benchmark failed")
    return time.perf_counter() - began


def _worker(gate: multiprocessing.synchronize.Barrier, call: Call, paths: Sequence[str]) -> None:
    gate.wait()
    each(call, paths)
