"""A kernel that only records what a KernelCache tells it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from apollofs.fs.kernel_cache import KernelCache


@dataclass
class Kernel:
    """What a kernel would be told. `unknown` are inodes that it does not know; `lock` is the directory's."""

    told: list[tuple[object, ...]] = field(default_factory=list)
    unknown: set[int] = field(default_factory=set)
    referenced: set[int] = field(default_factory=set)
    known_after: int = 0
    """So many notifications until it knows all inodes."""
    submounts: bool = False
    has_epochs: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_expire: Callable[[], None] = lambda: None

    def invalidate_attributes(self, ino: int) -> bool:
        self.told.append(("attributes", ino))
        return ino not in self.unknown

    def invalidate_attributes_of(self, inos: Sequence[int]) -> list[int]:
        self.told += [("attributes", ino) for ino in inos]
        if len(self.told) == self.known_after:
            self.unknown.clear()
        return [ino for ino in inos if ino in self.unknown]

    def invalidate_pages_of(self, inos: Sequence[int]) -> None:
        self.told += [("pages", ino) for ino in inos]

    def expire_entries(self, parent: int, names: Sequence[bytes]) -> None:
        self.on_expire()
        with self.lock:
            self.told.append(("entries", parent, *sorted(names)))

    def inc_epoch(self) -> bool:
        self.told.append(("epoch",))
        return self.has_epochs


def attach(cache: KernelCache, kernel: Kernel) -> None:
    """The mount of `cache` answers from now on."""
    cache.attach(kernel, kernel.referenced.__contains__, lambda: kernel.submounts)
    kernel.told.clear()
