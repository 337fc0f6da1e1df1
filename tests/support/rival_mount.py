"""The command on a mount that takes turns on whatever directory another mount changes too, run as `apollofs` is.

A mount does so only after some changes in quick succession; tests of turns want it at once, and always.
"""

from __future__ import annotations

import sys

from apollofs.fs.cli.app import main
from apollofs.metadata import rivals


def be_rival() -> None:
    """See the module; for this process."""
    rivals.CHANGES_BEFORE = rivals.CHANGES_TO_JOIN = 1
    rivals.RECENT_S = 5.0
    rivals.AWAY_FIRST_S = rivals.AWAY_MOST_S = 0.0


if __name__ == "__main__":
    be_rival()
    sys.exit(main())
