"""The jobs that are open: files whose bodies may have to be copied to this site.

Bounded: where JOBS_MAX are open the feed waits, and with it the journal, which etcd keeps. Walks, of which many tasks
wait for room, fill half of that, so that what is committed meanwhile is always let in beside them. What a reader waits
for comes first and has WANTED_MAX places of its own.

Where a site can't be read, its jobs wait apart until it can, so that they take no room from others: a quarter of
JOBS_MAX in memory; of those beyond it is only kept from where to where the journal speaks of them, and the position
stays before that. When the site is back they are found again (`feed.make_up`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import count

import trio

from apollofs.metadata.ops.common import Location

JOBS_MAX = 10_000
WANTED_MAX = 1000
"""Wishes that are open and wait for no site; the others stay in etcd."""
WANTED, COMMITTED, MOVED = range(3)
"""Ranks: a reader waits; a mount has committed it; a policy has changed."""


@dataclass(eq=False, slots=True)
class Walk:
    """One look at a whole tree. `open` counts its jobs that are not done, `away` those of them that wait for a site."""

    open: int = 0
    away: int = 0
    drained: trio.Event = field(default_factory=trio.Event)
    left_out: set[int] = field(default_factory=set)
    """Sites of which files were left out: the tree is to be looked at again when these are back."""

    async def wait(self, away_max: int | None = None) -> None:
        """Until none of its jobs is open, or (None) none but those that wait for a site."""
        while self.open > (self.away if away_max is None else away_max):
            self.drained = trio.Event()
            await self.drained.wait()


@dataclass(eq=False, slots=True)
class Job:
    """`revision`: where the journal speaks of it, 0 if it does not. `since_ns`: when it was committed or asked for.
    `wish`: mod_revision of the newest wish for it, 0 if there is none."""

    ino: int
    location: Location | None
    rank: int
    since_ns: int
    revision: int = 0
    wish: int = 0
    walks: list[Walk] = field(default_factory=list)
    attempts: int = 0
    taken: bool = False

    def absorb(self, other: Job) -> None:
        """One job does for both: it reads the inode when it is its turn."""
        self.location = other.location or self.location
        self.since_ns = min(self.since_ns, other.since_ns)
        self.revision = min(filter(None, (self.revision, other.revision)), default=0)
        self.wish = max(self.wish, other.wish)
        self.walks += other.walks


@dataclass(slots=True)
class Owed:
    """What was left out while sites could not be read: the journal speaks of it at revisions `first` to `last`."""

    first: int
    last: int

    def include(self, other: Owed) -> None:
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


class Backlog:
    """Filled by feeds and walks, emptied by workers."""

    def __init__(self, jobs_max: int = JOBS_MAX, wanted_max: int = WANTED_MAX) -> None:
        self._jobs_max = jobs_max
        self._wanted_max = wanted_max
        self._ready: tuple[deque[Job], ...] = (deque(), deque(), deque())
        self._waiting: dict[int, Job] = {}
        """By inode: those that nobody has taken yet."""
        self._busy: set[int] = set()
        """Inodes of jobs that are taken: what comes for them meanwhile waits, so that nothing is copied twice."""
        self._resting: list[tuple[float, int, Job]] = []
        self._tickets = count()
        self._open: set[Job] = set()
        self._wanted: set[Job] = set()
        """Those of the open ones that are WANTED and wait for no site."""
        self._away: dict[int, dict[int, Job]] = {}
        """Sites that can't be read; by inode, the open jobs that wait for that to end."""
        self._owed: dict[int, Owed] = {}
        self._wishes_left_out: set[int] = set()
        """Sites of which wishes were left out."""
        self._making_up = 0
        self._changed = trio.Event()
        self._mark = 0
        self.heard = 0
        """The newest revision of the journal whose jobs were added."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def position(self) -> int:
        """Everything that the journal says up to this revision has been done. 0: nothing is known of it."""
        revisions = [job.revision for job in self._open] + [owed.first for owed in self._owed.values()]
        return min([self._mark, *(revision - 1 for revision in (*revisions, self._making_up) if revision)])

    @property
    def oldest_ns(self) -> int:
        """Since when the oldest open job waits; 0 if there is none."""
        return min((job.since_ns for job in self._open), default=0)

    def mark(self, revision: int) -> None:
        """The journal has been read up to this revision, and its jobs were added."""
        self._mark = max(self._mark, revision)

    async def add(self, job: Job) -> None:
        """Once there is room. Cancelled, it is not added."""
        while self._is_full_for(job.rank):
            await self._change()
        for walk in job.walks:
            walk.open += 1
        waiting = self._waiting.get(job.ino)
        if waiting is not None:
            waiting.absorb(job)
            if job.rank >= waiting.rank:
                return
            waiting.rank, job = job.rank, waiting
        self._open.add(job)
        self._offer(job)

    def _is_full_for(self, rank: int) -> bool:
        if rank == WANTED:
            return len(self._wanted) >= self._wanted_max
        is_half_full = len(self._open) - self._count_away() >= self._jobs_max // 2
        return len(self._open) >= self._jobs_max or (rank == MOVED and is_half_full)

    async def take(self, count_max: int, rank_max: int = MOVED) -> list[Job]:
        """The next ones, all of one rank up to `rank_max`, once there is one. `done` or `again` must follow each."""
        while True:
            self._wake_resting()
            for queue in self._ready[: rank_max + 1]:
                taken: list[Job] = []
                while queue and len(taken) < count_max:
                    job = queue.popleft()
                    if not job.taken:  # it may stand in two queues
                        job.taken = True
                        self._busy.add(job.ino)
                        self._waiting.pop(job.ino, None)
                        taken.append(job)
                if taken:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    return taken
            due = self._resting[0][0] if self._resting else float("inf")
            with trio.move_on_at(due):
                await self._change()

    def done(self, job: Job) -> None:
        self._free(job.ino)
        self._close(job)
        self._wake()

    def again(self, job: Job, pause_s: float) -> None:
        """It could not be done now."""
        job.attempts += 1
        self._free(job.ino)
        heapq.heappush(self._resting, (trio.current_time() + pause_s, next(self._tickets), job))
        self._wake()

    def _wake_resting(self) -> None:
        while self._resting and self._resting[0][0] <= trio.current_time():
            self._return(heapq.heappop(self._resting)[2])

    def _return(self, job: Job) -> None:
        """It may be taken again; what came for the inode meanwhile does for both."""
        newer = self._waiting.get(job.ino)
        if newer is None:
            self._offer(job)
            return
        newer.absorb(job)
        self._forget(job)
        if job.rank < newer.rank:
            newer.rank = job.rank
            self._offer(newer)

    # -- sites that can't be read ------------------------------------------------------------------------------------

    @property
    def away(self) -> Collection[int]:
        """Sites that can't be read."""
        return self._away.keys()

    def put_off(self, job: Job, site: int) -> bool:
        """It could not be done, as `site` can't be read: it waits until `back` says that this has ended. Whether that
        was news: then somebody is to see to it that `back` is called."""
        is_news = site not in self._away
        waiting = self._away.setdefault(site, {})
        twin = waiting.get(job.ino)
        self._free(job.ino)
        if twin is None and self._count_away() >= self._jobs_max // 4:
            self._leave_out(job, site)
        else:
            self._wanted.discard(job)
            for walk in job.walks:
                walk.away += 1
                walk.drained.set()
            if twin is None:
                waiting[job.ino] = job
            else:
                twin.absorb(job)
                twin.rank = min(twin.rank, job.rank)
                self._forget(job)
        self._wake()
        return is_news

    def _leave_out(self, job: Job, site: int) -> None:
        if job.revision:
            owed = Owed(job.revision, job.revision)
            self._owed.setdefault(site, owed).include(owed)
        for walk in job.walks:
            walk.left_out.add(site)
        if job.rank == WANTED:
            self._wishes_left_out.add(site)
        self._close(job)

    def back(self, site: int) -> None:
        """A site can be read again."""
        for job in self._away.pop(site, {}).values():
            for walk in job.walks:
                walk.away -= 1
            self._return(job)
        self._wake()

    async def reachable(self, sites: Collection[int]) -> None:
        """Wait until all of these can be read."""
        while not self._away.keys().isdisjoint(sites):
            await self._change()

    async def owed(self) -> Owed:
        """Wait until a site is back of whose jobs some were left out: which. They are to be added anew, in order, and
        `made_up` be told how far that has come: the position stays before it."""
        while not (found := self._owed.keys() - self._away.keys()):
            await self._change()
        owed = self._owed.pop(found.pop())
        for site in found:
            owed.include(self._owed.pop(site))
        self._making_up = owed.first
        return owed

    async def wishes_left_out(self) -> None:
        """Wait until a site is back of which wishes were left out: they are to be added again."""
        while not (found := self._wishes_left_out - self._away.keys()):
            await self._change()
        self._wishes_left_out -= found

    def made_up(self, revision: int) -> None:
        """What was left out before this revision is added again; 0: all of it is."""
        self._making_up = revision

    def _count_away(self) -> int:
        return sum(map(len, self._away.values()))

    # -- what becomes of them ----------------------------------------------------------------------------------------

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        self._wanted.discard(job)

    def _close(self, job: Job) -> None:
        self._forget(job)
        for walk in job.walks:
            walk.open -= 1
            walk.drained.set()

    def _offer(self, job: Job) -> None:
        job.taken = False
        if job.rank == WANTED:
            self._wanted.add(job)
        self._waiting[job.ino] = job
        if job.ino not in self._busy:
            self._ready[job.rank].append(job)
        self._wake()

    def _free(self, ino: int) -> None:
        self._busy.discard(ino)
        waiting = self._waiting.get(ino)
        if waiting is not None:
            self._ready[waiting.rank].append(waiting)

    def _wake(self) -> None:
        self._changed.set()

    async def _change(self) -> None:
        self._changed = trio.Event() if self._changed.is_set() else self._changed
        await self._changed.wait()
