"""One site while days are played: what its training does, what lies in its store, what its stores move."""

from __future__ import annotations

import math

from apollofs.fs.sizing.assumptions import Assumptions
from apollofs.fs.sizing.ledger import Ledger
from apollofs.fs.sizing.planning import copy_policy, publish_policy, save_policy
from apollofs.fs.sizing.played import Activity, Lag, PlayedSite
from apollofs.fs.sizing.results import SitePlan
from apollofs.fs.sizing.retaining import Kept, Shelf


class SiteRun:
    """The state of a site. `life` counts the starts of its training: events of an earlier life are void."""

    def __init__(self, plan: SitePlan, given: Assumptions) -> None:
        self.plan, self.shape, self.name = plan, plan.shape, plan.shape.name
        self.ledger = Ledger()
        self.saves = Shelf(save_policy(given))
        self.published = Shelf(publish_policy(given))
        self.copies: dict[str, Shelf] = {}
        self.completed: list[Kept] = []
        self.life = 0
        self.is_down = False
        self._given = given
        self._state = round(plan.shape.state_bytes)
        self._saving_s: float | None = None
        self._progress_s = 0.0
        self._down_s = 0.0
        self._useless_s = 0.0
        self._failures = self._cut_short = 0
        self._loading_until_s = 0.0
        self._load_waits = False
        self._samples: list[tuple[float, dict[str, int]]] = []
        self._activities: list[Activity] = []
        self._publish_lags: list[Lag] = []
        self._copy_lags: list[Lag] = []

    def begin(self) -> None:
        """Datasets and scratch are there from the start."""
        self.ledger.write("datasets", round(self.plan.space.datasets))
        self.ledger.write("scratch", round(self.plan.space.scratch))
        self._samples.append((0.0, dict(self.ledger.present)))
        self._activities.append(Activity(0.0, math.inf, self.plan.throughput.dataset))

    # -- training

    def save_begins(self, now_s: float) -> None:
        self._saving_s = now_s

    def save_ends(self, now_s: float) -> Kept:
        """The checkpoint is durable: the one that was just written."""
        assert self._saving_s is not None
        self._activities.append(Activity(self._saving_s, now_s, self.plan.throughput.save))
        self._useless_s += now_s - self._saving_s
        self._saving_s, self._progress_s = None, now_s
        item = Kept(len(self.completed) + 1, now_s, self._state)
        self.completed.append(item)
        self.saves.add(item)
        self.ledger.write("saves", self._state)
        return item

    def fails(self, now_s: float) -> int:
        """Training stops, amid a save or a start as well, and begins a new life, whose number is returned."""
        self._failures += 1
        if self._saving_s is not None:
            self._cut_short += 1
            done = (now_s - self._saving_s) / self._given.workload.save_stall_s
            self.ledger.write_in_vain(round(self._state * min(1.0, done)), now_s)
            self._activities.append(Activity(self._saving_s, now_s, self.plan.throughput.save))
        # since the last checkpoint, or since the last start was begun: none of it leads anywhere
        self._useless_s += now_s - (self._down_s if self.is_down else self._progress_s)
        self._saving_s, self.is_down, self._down_s = None, True, now_s
        self.life += 1
        return self.life

    def restored(self, now_s: float) -> None:
        """Training goes on from the last checkpoint."""
        work = self._given.workload
        self._activities.append(Activity(now_s - work.restore_s, now_s, self.plan.throughput.restore))
        self._useless_s += now_s - self._down_s
        self.is_down, self._progress_s = False, now_s

    # -- what comes and goes

    def publication(self, item: Kept, asked_s: float, now_s: float) -> float | None:
        """New weights are here. When `load` is to be called, if at all: it reads what is the newest by then."""
        self.ledger.write("published", int(item.size))
        self.published.add(item)
        self._publish_lags.append(Lag(asked_s, now_s - asked_s))
        if not self.plan.throughput.load or self._load_waits:
            return None
        self._load_waits = True
        return max(now_s, self._loading_until_s)

    def load(self, now_s: float) -> None:
        """All inference GPUs read the newest weights."""
        self._load_waits = False
        self._loading_until_s = now_s + self._given.workload.publish_load_s
        self._activities.append(Activity(now_s, self._loading_until_s, self.plan.throughput.load))

    def copy(self, source: str, item: Kept, asked_s: float, now_s: float) -> None:
        """A checkpoint of another site is here."""
        self.ledger.write("copies", int(item.size))
        shelf = self.copies.setdefault(source, Shelf(copy_policy(self._given)))
        shelf.add(item)
        self._copy_lags.append(Lag(asked_s, now_s - asked_s))

    def clean(self, now_s: float) -> None:
        """Remove what has waited long enough; then find what need not stay any more."""
        self._samples.append((now_s, dict(self.ledger.present)))
        self.ledger.collect(now_s, self._given.retention.gc_grace_s)
        self.ledger.drop("saves", self.saves.retire(now_s), now_s)
        self.ledger.drop("published", self.published.retire(now_s), now_s)
        for shelf in self.copies.values():
            self.ledger.drop("copies", shelf.retire(now_s), now_s)

    def result(self, end_s: float, moved: list[Activity], backlog_peak: float) -> PlayedSite:
        """What was seen, up to this time; `moved` is what its links brought and took."""
        useless_s = self._useless_s + (end_s - self._down_s if self.is_down else 0.0)
        ledger = self.ledger
        return PlayedSite(
            name=self.name,
            samples=(*self._samples, (end_s, dict(ledger.present))),
            activities=tuple(one for one in (*self._activities, *moved) if one.begin_s < end_s),
            publish_lags=tuple(self._publish_lags),
            copy_lags=tuple(self._copy_lags),
            written=ledger.written,
            removed=ledger.removed,
            present=ledger.total(),
            peak=ledger.peak,
            saves=len(self.completed),
            cut_short=self._cut_short,
            failures=self._failures,
            goodput=1 - useless_s / end_s if self.shape.training_gpus else 0.0,
            backlog_peak=backlog_peak,
        )
