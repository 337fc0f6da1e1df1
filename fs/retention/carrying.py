"""Carrying out verdicts: what goes is taken out of sight only while all that its verdict rests on is as it was read.

The transaction that moves its names compares that (`Series.unchanged`):

- the directory's times: every change of names there writes them, so a new link, tracker or checkpoint is noticed,
  whatever its name, and a newer checkpoint that has gone;
- each tracker file, which may be written in place; a link's target never changes;
- the policy, and that no directory below it has been given one of its own;
- the line of directory moves, while which is the same every directory is where it was.

Where something has changed it is read again. A checkpoint then goes only if the policy is the same and holds there,
nothing new holds its names, and what the policy has kept as complete is there and complete.
"""

from __future__ import annotations

import logging
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from apollofs.fs.retention.candidates import Candidate
from apollofs.fs.retention.names import Steps
from apollofs.fs.retention.parking import Parking
from apollofs.fs.retention.series import Found, Series, SeriesReader, TooManyNames
from apollofs.fs.retention.verdicts import MAY_BE_INCOMPLETE, Hold, Verdict, Why
from apollofs.metadata.errors import NamespaceError, OperationNotPermitted, Sealed
from apollofs.metadata.keys import Keys
from apollofs.metadata.retention import READ_S
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store
from apollofs.metadata.tree import Tree

log = logging.getLogger(__name__)
ATTEMPTS = 5
"""To move one checkpoint, where others change names beside it all the time."""
CHANGED = Hold(Why.CHANGING, "names, or a tracker, have just changed")
POLICY_CHANGED = Hold(Why.CHANGING, "the policy has just been changed")
_REFUSED = {Sealed: Why.SEALED, OperationNotPermitted: Why.IMMUTABLE}
"""What the namespace says of a move, since the look; else something has gone."""
MOVED = Hold(Why.CHANGING, "the directory has just been moved")
KEPT_CHANGED = Hold(Why.CHANGING, "one that the policy keeps has just been changed or removed")


class Carrying:
    """Carries out the verdicts of one policy, once. Methods raise SessionLost, DeadlineExceeded, StoreError,
    CorruptRecord."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        parking: Parking,
        reader: SeriesReader,
        steps: Steps,
        decided: Sequence[tuple[Candidate, Verdict]],
    ) -> None:
        self._store = store
        self._keys = keys
        self._tree = Tree(store, keys)
        self._parking = parking
        self._reader = reader
        self._steps = steps
        self._kept: defaultdict[int, list[Found]] = defaultdict(list)
        for candidate, verdict in decided:
            if not verdict.goes and verdict.why not in MAY_BE_INCOMPLETE:
                self._kept[candidate.series.directory].append(candidate.found)
        self._read_again: dict[int, Series] = {}
        """By directory: what is known of it instead of what the verdicts were found on."""
        self._closed: dict[int, Hold] = {}
        """Directories in which nothing more goes."""
        self._own_moves = (0, 0)
        """Revisions of the line of directory moves, between which all moves are ours."""

    async def carry_out(self, candidate: Candidate, verdict: Verdict) -> Verdict:
        """Take out of sight what goes; what can't be stays, and it is said why.

        Three requests and one for the look before them; some more where somebody has changed something.
        """
        if not verdict.goes:
            return verdict
        try:
            hold = await self._park(candidate)
        except NamespaceError as exc:
            hold = Hold(_REFUSED.get(type(exc), Why.CHANGING), str(exc))
        if hold is not None:
            return Verdict(verdict.checkpoint, False, hold.why, hold.detail)
        log.info("checkpoint %s is removed: %s %s", candidate.path, verdict.why, verdict.detail)
        return verdict

    async def _park(self, candidate: Candidate) -> Hold | None:
        directory = candidate.series.directory
        for _ in range(ATTEMPTS):
            series = self._read_again.get(directory, candidate.series)
            if directory not in self._closed:
                await self._look_for_changes(series)
                series = self._read_again.get(directory, series)
            hold = self._closed.get(directory) or _hold_in(series, candidate.found)
            if hold is not None:
                return hold
            revision = await self._parking.park(directory, candidate.found.entries, series.unchanged)
            if revision:
                self._note_own(series, candidate.found, revision)
                return None
        return CHANGED

    def _note_own(self, series: Series, found: Found, revision: int) -> None:
        """What the move itself has written."""
        series.unchanged[self._keys.times(series.directory)] = revision
        if any(stat.S_ISDIR(entry.file_type) for entry in found.entries):
            before = series.unchanged[self._keys.dirmove]
            self._own_moves = self._own_moves[0] if before == self._own_moves[1] else before, revision

    # -- what others have changed ------------------------------------------------------------------------------------

    async def _look_for_changes(self, series: Series) -> None:
        """One request; where something has changed, read it again, or close the directory."""
        first, last = self._own_moves
        if first <= series.unchanged[self._keys.dirmove] <= last:
            series.unchanged[self._keys.dirmove] = last
        asked = [Range(key, keys_only=True) for key in series.unchanged]
        result = await retry(lambda: self._store.txn((), asked), READ_S)
        revisions = [found.kvs[0].mod_revision if found is not None and found.kvs else 0 for found in result.ranges]
        changed = {
            key: revision
            for (key, before), revision in zip(series.unchanged.items(), revisions, strict=True)
            if revision != before
        }
        if changed:
            hold = await self._follow(series, changed)
            if hold is not None:
                self._closed[series.directory] = hold

    async def _follow(self, series: Series, changed: dict[bytes, int]) -> Hold | None:
        """Read again; what keeps everything in the directory, if anything does. `changed`: with their revisions now."""
        if any(key.startswith(self._keys.retentions) for key in changed):
            return POLICY_CHANGED
        reach = replace(series.reach, moves=changed.get(self._keys.dirmove, series.unchanged[self._keys.dirmove]))
        if self._keys.dirmove in changed:
            path = await self._tree.path_of(series.directory)
            if path is None or path.rstrip(b"/") != reach.path:
                return MOVED
        try:
            again = await self._reader.read(reach, self._steps)
        except TooManyNames as exc:
            return Hold(Why.UNFIT, str(exc))
        self._read_again[series.directory] = again
        return None if all(_is_kept(again, found) for found in self._kept[series.directory]) else KEPT_CHANGED


def _hold_in(series: Series, found: Found) -> Hold | None:
    """What names and trackers, as they were read last, hold a checkpoint by that was to go."""
    now = series.found.get(found.step)
    return now.hold if now is not None and now.inodes == found.inodes else CHANGED


def _is_kept(series: Series, found: Found) -> bool:
    """Whether what was counted as complete is there, and counts still."""
    now = series.found.get(found.step)
    if now is None or not now.inodes >= found.inodes:
        return False
    return now.hold is None or now.hold.why not in MAY_BE_INCOMPLETE
