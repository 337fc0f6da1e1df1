"""Record locks and flocks of a few holders on one file, byte by byte."""

from __future__ import annotations

import fcntl

BYTES = 16
"""Length of the file's part that is locked."""


class PlainLocks:
    """`record[holder][byte]` and `whole[holder]` are LOCK_SH, LOCK_EX or LOCK_UN."""

    def __init__(self, holders: int) -> None:
        self.record = [[fcntl.LOCK_UN] * BYTES for _ in range(holders)]
        self.whole = [fcntl.LOCK_UN] * holders

    def set_record(self, holder: int, type_: int, start: int, length: int) -> bool:
        """Whether it is granted; what was held stays where it is not."""
        others = [locks for index, locks in enumerate(self.record) if index != holder]
        wanted = range(start, start + length)
        if any(_conflict(type_, locks[byte]) for locks in others for byte in wanted):
            return False
        self.record[holder][start : start + length] = [type_] * length
        return True

    def set_whole(self, holder: int, type_: int) -> bool:
        """Whether it is granted. If not, what the holder had is lost or not, as the system likes: give it up then."""
        if any(_conflict(type_, lock) for index, lock in enumerate(self.whole) if index != holder):
            self.whole[holder] = fcntl.LOCK_UN
            return False
        self.whole[holder] = type_
        return True


def _conflict(wanted: int, held: int) -> bool:
    return fcntl.LOCK_UN not in (wanted, held) and fcntl.LOCK_EX in (wanted, held)
