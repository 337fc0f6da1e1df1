"""From exceptions to errno: the only place that knows both.

Every leaf of the three error trees (`metadata.errors`, `blobstore.errors`, `fs.errors`) has its line here; a test
walks the trees and proves it. Whatever is not here is a bug: the caller of `errno_of` answers EIO and logs a traceback.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from apollofs.blobstore import errors as blob
from apollofs.fs import errors as body
from apollofs.fs.user_error import leaves
from apollofs.metadata import errors as meta

ERRNO: Final[Mapping[type[BaseException], int]] = MappingProxyType(
    {
        # the store: the request may be right, but cannot be served
        meta.StoreUnavailable: errno.EIO,
        meta.OutcomeUnknown: errno.EIO,
        meta.Compacted: errno.EIO,
        meta.StoreAuthFailed: errno.EIO,
        meta.RequestTooLarge: errno.EIO,
        meta.StoreFull: errno.ENOSPC,
        meta.LeaseNotFound: errno.EIO,
        meta.StoreMisuse: errno.EIO,
        # session and volume
        meta.SessionLost: errno.EIO,
        meta.DeadlineExceeded: errno.EIO,
        meta.NotFormatted: errno.EIO,
        meta.AlreadyFormatted: errno.EEXIST,
        meta.UnsupportedFormat: errno.EIO,
        meta.UnknownSite: errno.EIO,
        meta.SiteInUse: errno.EBUSY,
        meta.SiteLeaving: errno.EBUSY,
        meta.CollectorBusy: errno.EBUSY,
        meta.ChangesLost: errno.EIO,
        meta.RoleLost: errno.EIO,
        meta.RoleTaken: errno.EBUSY,
        meta.ArchiveUnavailable: errno.EIO,
        meta.CorruptRecord: errno.EIO,
        # the namespace, as POSIX says
        meta.NoSuchEntry: errno.ENOENT,
        meta.StaleInode: errno.ESTALE,
        meta.EntryExists: errno.EEXIST,
        meta.RevisionConflict: errno.EAGAIN,
        meta.NotADirectory: errno.ENOTDIR,
        meta.IsADirectory: errno.EISDIR,
        meta.DirectoryNotEmpty: errno.ENOTEMPTY,
        meta.NameTooLong: errno.ENAMETOOLONG,
        meta.InvalidArgument: errno.EINVAL,
        meta.OperationNotPermitted: errno.EPERM,
        meta.Sealed: errno.EROFS,
        meta.HoldsSealed: errno.EBUSY,
        meta.SealRefused: errno.EBUSY,
        meta.PermissionRefused: errno.EACCES,
        meta.TooManyLinks: errno.EMLINK,
        meta.FileTooLarge: errno.EFBIG,
        meta.NoSuchAttribute: errno.ENODATA,
        meta.AttributeExists: errno.EEXIST,
        meta.AttributeTooLarge: errno.ENOSPC,
        meta.NotSupported: errno.EOPNOTSUPP,
        meta.QuotaExceeded: errno.EDQUOT,
        meta.LockConflict: errno.EAGAIN,
        meta.LockDeadlock: errno.EDEADLK,
        meta.TooManyLocks: errno.ENOLCK,
        # bodies
        meta.BodyConflict: errno.EIO,
        meta.CloneSourceChanged: errno.EIO,
        meta.TooManyExtents: errno.EFBIG,
        body.BodyUnavailable: errno.EIO,
        body.CorruptBody: errno.EIO,
        body.MissingBlob: errno.EIO,
        body.StagingFull: errno.ENOSPC,
        body.ImageShared: errno.ETXTBSY,
        body.CopyCut: errno.EIO,
        body.StagingFailed: errno.EIO,
        body.BodyLost: errno.EIO,
        body.NoDataThere: errno.ENXIO,
        body.BadHandle: errno.EBADF,
        body.CacheDirectoryUnusable: errno.EIO,
        # the blob store
        blob.NoSuchBlob: errno.EIO,
        blob.RangeUnavailable: errno.EIO,
        blob.CorruptBlob: errno.EIO,
        blob.BlobStoreUnavailable: errno.EIO,
        blob.BlobStoreTimeout: errno.EIO,
        blob.BlobStoreRefused: errno.EIO,
        blob.BlobStoreFull: errno.ENOSPC,
        blob.BadBlobURL: errno.EIO,
        blob.BadBlobName: errno.EIO,
    }
)


log = logging.getLogger(__name__)
LOGGED = (meta.CorruptRecord, meta.UnsupportedFormat, meta.StoreMisuse)
"""What never happens in a sound volume, so that it must not pass as just another EIO."""


def errno_of(exc: BaseException) -> int | None:
    """The errno for an exception of the error trees; None for anything else, which is a bug.

    A leaf is found by its own class or the nearest mapped one above it. The local disk being full (an OSError of the
    cache directory) is ENOSPC too. A group of errors, as a nursery raises it, has an errno if all its members have:
    theirs where they agree, else EIO.
    """
    if isinstance(exc, BaseExceptionGroup):
        numbers = {errno_of(leaf) for leaf in leaves(exc)}
        if None in numbers:
            return None
        return numbers.pop() if len(numbers) == 1 else errno.EIO
    if isinstance(exc, LOGGED):
        log.error("a request fails with EIO: %s: %s", type(exc).__name__, exc)
    for cls in type(exc).__mro__:
        if cls in ERRNO:
            return ERRNO[cls]
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return errno.ENOSPC
    return None
