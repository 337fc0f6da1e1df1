"""What processes do to a mount while its change log is followed: anything, on few names, so that they meet.

Each is at home in one directory, where its mount mostly changes names alone, ahead of etcd.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apollofs.fs.mountinfo import mount_at

NAMES = "abcd"
AT_HOME = 0.95
"""How often. What is done elsewhere takes its delegations from who is at home there."""
DEPTHS = (0, *[1, 2] * 5)
"""Below the top; there all meet."""
GONE = (errno.ENOTCONN, errno.ECONNABORTED)
"""What calls say of a mount whose daemon has died."""
EXCHANGE = 2


@dataclass(frozen=True)
class Place:
    """A mount's root, and the name in it where its processes are at home."""

    root: Path
    home: str


def play(place: Place, count: int, seed: int) -> int:
    """Do `count` random things; how many succeeded. Ends early when the mount has died."""
    rng = random.Random(seed)
    done = 0
    for _ in range(count):
        try:
            rng.choice(CALLS)(place, rng)
            done += 1
        except OSError as exc:
            if exc.errno in GONE or mount_at(str(place.root)) is None:
                return done
    return done


def some_path(place: Place, rng: random.Random) -> Path:
    top = place.home if rng.random() < AT_HOME else rng.choice(NAMES)
    return place.root.joinpath(top, *(rng.choice(NAMES) for _ in range(rng.choice(DEPTHS))))


def write(place: Place, rng: random.Random) -> None:
    flags = rng.choice([os.O_TRUNC, os.O_APPEND, 0]) | rng.choice([os.O_CREAT, os.O_CREAT | os.O_EXCL])
    # a fifo without a reader is refused, not waited for
    fd = os.open(some_path(place, rng), flags | os.O_WRONLY | os.O_NONBLOCK, 0o644)
    try:
        os.write(fd, rng.randbytes(rng.choice([0, 10, 5000, 40_000])))
        if rng.random() < 0.3:
            os.fsync(fd)
    finally:
        os.close(fd)


def make(place: Place, rng: random.Random) -> None:
    rng.choice([os.mkdir, os.mkdir, os.mkdir, os.mkfifo])(some_path(place, rng))


def remove(place: Place, rng: random.Random) -> None:
    path = some_path(place, rng)
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def rename(place: Place, rng: random.Random) -> None:
    os.rename(some_path(place, rng), some_path(place, rng))


def link(place: Place, rng: random.Random) -> None:
    if rng.random() < 0.5:
        os.symlink(rng.choice(NAMES), some_path(place, rng))
    else:
        os.link(some_path(place, rng), some_path(place, rng), follow_symlinks=False)


def change(place: Place, rng: random.Random) -> None:
    path = some_path(place, rng)
    if path.is_symlink():
        os.utime(path, ns=(5, rng.randrange(1 << 60)), follow_symlinks=False)
        return
    calls: list[Callable[[], None]] = [
        lambda: os.chmod(path, rng.choice([0o600, 0o755, 0o4711])),
        lambda: os.chown(path, rng.randrange(3), -1),
        lambda: os.utime(path, ns=(rng.randrange(1 << 60), rng.randrange(1 << 60))),
        lambda: os.utime(path),
        lambda: os.truncate(path, rng.choice([0, 7, 100_000])),
    ]
    rng.choice(calls)()


def xattr(place: Place, rng: random.Random) -> None:
    path, name = some_path(place, rng), f"user.{rng.choice(NAMES)}"
    if rng.random() < 0.6:
        os.setxattr(path, name, rng.randbytes(rng.choice([0, 8, 500])))
    else:
        os.removexattr(path, name)


CALLS: list[Callable[[Place, random.Random], None]] = [
    *[write] * 4,
    *[make] * 3,
    *[rename] * 3,
    *[remove] * 2,
    *[link, change, xattr] * 2,
]
