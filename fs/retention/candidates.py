"""All checkpoints under one policy: found by walking its directories, looked at as far as the verdicts depend on it."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from apollofs.fs.retention.looking import Looked, Looking
from apollofs.fs.retention.names import Steps
from apollofs.fs.retention.series import Found, Reach, Series, SeriesReader, TooManyNames
from apollofs.fs.retention.verdicts import Checkpoint, Hold, Verdict, Why, decide
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.name_text import name_text
from apollofs.metadata.retention import Retention
from apollofs.metadata.volume import Volume

CHECKPOINTS_MAX = 100_000
DIRECTORIES_MAX = 100_000
"""Under one policy, held in memory."""


@dataclass(slots=True)
class Candidate:
    """A checkpoint and where it was found."""

    path: str
    series: Series
    found: Found
    changed_ns: int
    """The latest ctime of its names themselves."""
    looked: Looked | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        found, looked = self.found, self.looked
        hold = found.hold or (looked.hold if looked is not None else None)
        changed_ns = max(self.changed_ns, looked.changed_ns if looked is not None else 0)
        size_bytes = looked.size_bytes if looked is not None else 0
        directory, kinds = self.series.directory, tuple(found.kinds)
        return Checkpoint(directory, found.step, kinds, changed_ns / 1e9, size_bytes, hold, looked is not None)


class Candidates:
    """Those of one policy. Methods raise SessionLost, DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, volume: Volume, reader: SeriesReader, looking: Looking, policy: Retention) -> None:
        self._volume = volume
        self._reader = reader
        self._looking = looking
        self._policy = policy
        self.all: list[Candidate] = []
        self.directories = 0
        """With checkpoints in them."""
        self.errors: list[str] = []

    async def find(self, top: Reach, steps: Steps, own: frozenset[int]) -> None:
        """Find all in a directory and, if the policy says so, below, but not below a checkpoint, what is hidden, or one
        that is in `own`."""
        left = [top]
        while left:
            reach = left.pop()
            where = name_text(reach.path)
            try:
                series = await self._reader.read(reach, steps)
            except TooManyNames as exc:
                self.errors.append(f"{where}: {exc}: nothing is removed there")
                continue
            await self._add(series)
            if len(self.all) > CHECKPOINTS_MAX:
                self.errors.append(f"{where}: more than {CHECKPOINTS_MAX} checkpoints under one policy")
                return
            if self._policy.is_recursive:
                below = [each for each in series.below if each.ino not in own and not each.name.startswith(b".")]
                left += map(reach.below, below)
            if len(left) > DIRECTORIES_MAX:
                self.errors.append(f"{where}: more than {DIRECTORIES_MAX} directories under one policy")
                return

    async def _add(self, series: Series) -> None:
        self.directories += bool(series.found)
        for _, found in sorted(series.found.items()):
            changed_ns = await self._changed_ns(found)
            path = name_text(series.reach.path + b"/" + min(found.names))
            self.all.append(Candidate(path, series, found, changed_ns))

    async def _changed_ns(self, found: Found) -> int:
        """Of the names themselves; what is in a directory may be later. One request for each directory."""
        latest = 0
        for entry in found.entries:
            try:
                inode = entry.inode or await self._volume.getattr(entry.ino)
            except StaleInode:
                found.hold = found.hold or Hold(Why.CHANGING, "removed just now")
                continue
            latest = max(latest, inode.ctime_ns)
        return latest

    async def look(self, candidate: Candidate) -> None:
        """Look at all that is in it."""
        entries = candidate.found.entries
        marker = self._policy.marker.encode()
        if not any(stat.S_ISDIR(entry.file_type) for entry in entries):
            marker = b""
        candidate.looked = await self._looking.look(entries, marker)


async def fates(
    candidates: Candidates, now_s: float, free_bytes: int | None, policy: Retention
) -> list[tuple[Candidate, Verdict]]:
    """The verdicts. What goes was looked at, and what is counted among the last: that is what they rest on."""
    while True:
        verdicts = decide([each.checkpoint for each in candidates.all], now_s, free_bytes, policy)
        decided = list(zip(candidates.all, verdicts, strict=True))
        unseen = [each for each, verdict in decided if each.looked is None and _rests_on_looks(verdict)]
        if not unseen:
            return decided
        for candidate in unseen:
            await candidates.look(candidate)


def _rests_on_looks(verdict: Verdict) -> bool:
    return verdict.goes or verdict.why is Why.LAST
