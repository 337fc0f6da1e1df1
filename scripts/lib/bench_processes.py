"""Calls on many paths, in this process or in several that start together, and how long they took."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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


def process_s(pid: int) -> float:
    """The processor time that a process has spent so far, seconds: its own, and the kernel's on its behalf."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """The memory that a process has; "VmHWM": the most that it has had. Raises RuntimeError if it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the process {pid} has ended")
