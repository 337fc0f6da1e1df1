"""What can go wrong with open files and their bodies. Leaves name facts; errno belongs to `errno_map.py` alone."""

from __future__ import annotations


class BodyError(Exception):
    """Root of the tree."""


class BodyUnavailable(BodyError):
    """Bytes could not be read or stored in time, or the store refuses; they are not lost, and trying again may help."""


class CorruptBody(BodyError):
    """The store holds other bytes than were written, or none, where the file refers to them."""


class MissingBlob(CorruptBody):
    """The store has no such object. Who read with an old idea of the file reads it again before believing this."""


class StagingFull(BodyError):
    """The local disk has no room for what is being written; nothing of this write was kept."""


class ImageShared(BodyError):
    """A file that is read by passthrough can't be changed in place: others of this host use the same local file."""


class StagingFailed(BodyError):
    """The local disk failed, or is read-only, under what is being written."""


class CopyCut(BodyError):
    """A file that is being stored became shorter meanwhile; the commit looks at it anew."""


class BodyLost(BodyError):
    """What was written and not yet committed is gone: the mount's session ended before it could be committed."""


class NoDataThere(BodyError):
    """SEEK_DATA or SEEK_HOLE at or past the end, or SEEK_DATA where only a hole follows."""


class BadHandle(BodyError):
    """The number is not that of an open file, or the file was not opened for this."""


class CacheDirectoryUnusable(BodyError):
    """The cache directory can't be used at all; the message says why, in one line."""
