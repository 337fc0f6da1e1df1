"""Which checkpoints go: a pure function of what is known of them, the time, the free space and the policy.

A policy's rules, the first one that applies is the reason:

1. What is held stays (`Hold`). What may be incomplete is not counted by any other rule.
2. The newest `last` complete ones stay: of each kind, by step as well as by time of the last change. (Both: a run that
   was begun again from an earlier step has fresh checkpoints with lower numbers.)
3. Of the others those stay that `every` divides and that were changed no longer than `keep_for_s` ago.
4. While less than `min_free_bytes` would be free, of what rule 3 keeps the oldest goes, in all directories together.

Without holds, and with one kind whose steps come in order, rules 2 and 3 are `fs/sizing/retaining.must_keep`.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from apollofs.metadata.retention import Retention


class Why(enum.StrEnum):
    """Reasons, as people read them."""

    # holds
    INCOMPLETE = "incomplete"
    CHANGING = "changed lately"
    OPEN = "open"
    SILENT = "a mount does not answer"
    NAMED = "named"
    SEALED = "sealed"
    IMMUTABLE = "immutable"
    UNFIT = "can't be moved in one step"
    # rules
    LAST = "among the last"
    EVERY = "kept for its number and age"
    GOES = "not kept by any rule"
    SPACE = "space is short"


MAY_BE_INCOMPLETE = frozenset({Why.INCOMPLETE, Why.CHANGING, Why.OPEN, Why.SILENT})
"""What is open may be being written."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a checkpoint stays whatever the policy says."""

    why: Why
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One step in one directory. What only a look at all of it tells may be unknown (`looked` False): then it counts as
    complete, its size as 0, and `changed_s` is no later than it is."""

    directory: int
    step: int
    kinds: tuple[bytes, ...]
    changed_s: float
    """When anything of it was last changed (ctime), in seconds since 1970."""
    size_bytes: int = 0
    hold: Hold | None = None
    looked: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    checkpoint: Checkpoint
    goes: bool
    why: Why
    detail: str = ""


def decide(checkpoints: Sequence[Checkpoint], now_s: float, free_bytes: int | None, policy: Retention) -> list[Verdict]:
    """A verdict for each checkpoint under one policy, in their order. `free_bytes` None: it is not known."""
    holds = [_hold(each, now_s, policy) for each in checkpoints]
    counted = [
        each for each, hold in zip(checkpoints, holds, strict=True) if hold is None or hold.why not in MAY_BE_INCOMPLETE
    ]
    last = _last(counted, policy.last)
    verdicts = [
        Verdict(each, False, hold.why, hold.detail) if hold else _by_rules(each, last, now_s, policy)
        for each, hold in zip(checkpoints, holds, strict=True)
    ]
    if not policy.min_free_bytes or free_bytes is None:
        return verdicts
    return _with_room(verdicts, policy.min_free_bytes - free_bytes)


def _hold(checkpoint: Checkpoint, now_s: float, policy: Retention) -> Hold | None:
    if checkpoint.hold is not None:
        return checkpoint.hold
    return Hold(Why.CHANGING) if now_s - checkpoint.changed_s < policy.settle_s else None


def _last(checkpoints: Iterable[Checkpoint], count: int) -> set[tuple[int, int]]:
    """(directory, step) of those that rule 2 keeps."""
    series: defaultdict[tuple[int, bytes], list[Checkpoint]] = defaultdict(list)
    for each in checkpoints:
        for kind in each.kinds:
            series[each.directory, kind].append(each)
    found: set[tuple[int, int]] = set()
    orders: tuple[Callable[[Checkpoint], tuple[float, float]], ...] = (
        lambda each: (each.step, each.changed_s),
        lambda each: (each.changed_s, each.step),
    )
    for members in series.values():
        for order in orders:
            found.update((each.directory, each.step) for each in sorted(members, key=order)[-count:])
    return found


def _by_rules(checkpoint: Checkpoint, last: set[tuple[int, int]], now_s: float, policy: Retention) -> Verdict:
    if (checkpoint.directory, checkpoint.step) in last:
        return Verdict(checkpoint, False, Why.LAST, str(policy.last))
    is_young = not policy.keep_for_s or now_s - checkpoint.changed_s <= policy.keep_for_s
    if policy.every and checkpoint.step % policy.every == 0 and is_young:
        return Verdict(checkpoint, False, Why.EVERY)
    return Verdict(checkpoint, True, Why.GOES)


def _with_room(verdicts: list[Verdict], lacking_bytes: int) -> list[Verdict]:
    """Rule 4. `lacking_bytes`: before anything has gone."""
    lacking_bytes -= sum(verdict.checkpoint.size_bytes for verdict in verdicts if verdict.goes)
    may_go = [at for at, verdict in enumerate(verdicts) if verdict.why is Why.EVERY]
    for at in sorted(may_go, key=lambda at: (verdicts[at].checkpoint.changed_s, verdicts[at].checkpoint.step)):
        if lacking_bytes <= 0:
            break
        checkpoint = verdicts[at].checkpoint
        verdicts[at] = Verdict(checkpoint, True, Why.SPACE)
        lacking_bytes -= checkpoint.size_bytes
    return verdicts
