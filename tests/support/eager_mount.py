"""The command on a mount that takes a directory again as soon as it has given it back, run as `apollofs` is.

A mount leaves a directory alone for a while after a recall, so that two that share it fall back to plain round trips.
Tests of recalls want the opposite: a delegation, and a kernel with something to drop, each time. So it takes no turns
either, during which the kernel is given nothing (`rival_mount.py` is for these).
"""

from __future__ import annotations

import sys

from apollofs.fs.cli.app import main
from apollofs.metadata import pauses, rivals


def be_eager() -> None:
    """See the module; for this process."""
    pauses.FIRST_S = pauses.MOST_S = 0.0
    rivals.CHANGES_BEFORE = rivals.CHANGES_TO_JOIN = sys.maxsize


if __name__ == "__main__":
    be_eager()
    sys.exit(main())
