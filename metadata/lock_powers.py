"""What a mount's boards ask of the mount as a whole, and tell it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from apollofs.metadata.lock_records import LockKind


@dataclass(frozen=True)
class Powers:
    """What the boards (`lock_board.py`) of a mount have in common; an inode's locks are named by its number and their
    kind. No checkpoints."""

    new_ticket: Callable[[], int]
    """A number that no request of the session had before."""
    may_decide_alone: Callable[[int, LockKind], bool]
    turn_begins: Callable[[int, LockKind], float]
    """When (trio's clock) a turn ends that begins now; then, or before, the board is called to `tell`. 0: have none."""
    has_asked: Callable[[int, LockKind], None]
    """To be called when another mount is asked to tell."""
    passed_on: Callable[[], None]
    """To be called when a lock is about to be given back that another mount waits for."""
