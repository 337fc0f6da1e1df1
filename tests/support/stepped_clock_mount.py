"""The command on a mount whose wall clock a test can set, run as `apollofs` is.

The file that APOLLOFS_TEST_CLOCK names says by how much it is wrong, in seconds, as "+3600"; libfaketime reads it at
each look at the clock. Clocks that only count, and the times of files on the disk, stay as they are.
"""

from __future__ import annotations

import os
import sys

LIBRARY = "libfaketimeMT.so.1"


def library() -> str:
    """Where Debian's package libfaketime has put it."""
    found = [os.path.join("/usr/lib", arch, "faketime", LIBRARY) for arch in os.listdir("/usr/lib")]
    return next(path for path in found if os.path.exists(path))


def main() -> None:
    faked = {
        "LD_PRELOAD": library(),
        "FAKETIME_TIMESTAMP_FILE": os.environ["APOLLOFS_TEST_CLOCK"],
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    words = [sys.executable, "-m", "apollofs.fs.cli", *sys.argv[1:]]
    os.execve(sys.executable, words, {**os.environ, **faked})


if __name__ == "__main__":
    main()
