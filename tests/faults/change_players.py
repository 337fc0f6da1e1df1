"""What processes do to a mount while its change log is followed: anything, on few names, so that they meet."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

from apollofs.fs.mountinfo import mount_at

NAMES = "abcd"
GONE = (errno.ENOTCONN, errno.ECONNABORTED)
"""What calls say of a mount whose daemon has died."""
EXCHANGE = 2


def play(root: Path, count: int, seed: int) -> int:
    """Do `count` random things; how many succeeded. Ends early when the mount has died."""
    rng = random.Random(seed)
    done = 0
    for _ in range(count):
        try:
            rng.choice(CALLS)(root, rng)
            done += 1
        except OSError as exc:
            if exc.errno in GONE or mount_at(str(root)) is None:
                return done
    return done


def some_path(root: Path, rng: random.Random) -> Path:
    return root.joinpath(*(rng.choice(NAMES) for _ in range(rng.randrange(1, 4))))


def write(root: Path, rng: random.Random) -> None:
    flags = rng.choice([os.O_TRUNC, os.O_APPEND, 0]) | rng.choice([os.O_CREAT, os.O_CREAT | os.O_EXCL])
    # a fifo without a reader is refused, not waited for
    fd = os.open(some_path(root, rng), flags | os.O_WRONLY | os.O_NONBLOCK, 0o644)
    try:
        os.write(fd, rng.randbytes(rng.choice([0, 10, 5000, 40_000])))
        if rng.random() < 0.3:
            os.fsync(fd)
    finally:
        os.close(fd)


def make(root: Path, rng: random.Random) -> None:
    rng.choice([os.mkdir, os.mkdir, os.mkdir, os.mkfifo])(some_path(root, rng))


def remove(root: Path, rng: random.Random) -> None:
    path = some_path(root, rng)
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def rename(root: Path, rng: random.Random) -> None:
    os.rename(some_path(root, rng), some_path(root, rng))


def link(root: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        os.symlink(rng.choice(NAMES), some_path(root, rng))
    else:
        os.link(some_path(root, rng), some_path(root, rng), follow_symlinks=False)


def change(root: Path, rng: random.Random) -> None:
    path = some_path(root, rng)
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


def xattr(root: Path, rng: random.Random) -> None:
    path, name = some_path(root, rng), f"user.{rng.choice(NAMES)}"
    if rng.random() < 0.6:
        os.setxattr(path, name, rng.randbytes(rng.choice([0, 8, 500])))
    else:
        os.removexattr(path, name)


CALLS: list[Callable[[Path, random.Random], None]] = [
    *[write] * 4,
    *[make] * 3,
    *[rename] * 3,
    *[remove] * 2,
    *[link, change, xattr] * 2,
]
