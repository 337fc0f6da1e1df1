"""What can go wrong in the metadata layer. Leaves name facts; errno belongs to `fs/errno_map.py` alone."""

from __future__ import annotations

from apollofs.metadata.name_text import name_text


class MetadataError(Exception):
    """Root of the tree."""


# -- the store ------------------------------------------------------------------------------------------------------


class StoreError(MetadataError):
    """The key-value store could not do what was asked. Unless it is OutcomeUnknown, nothing was changed."""


class StoreUnavailable(StoreError):
    """No endpoint could be reached, or none has a leader; the request was not applied."""


class OutcomeUnknown(StoreError):
    """The connection or the deadline ended after the request had left: it may or may not have been applied."""


class Compacted(StoreError):
    """The revision asked for is no longer kept. `first_revision` is the oldest that can be had (0: not known)."""

    def __init__(self, message: str, first_revision: int = 0) -> None:
        super().__init__(message)
        self.first_revision = first_revision


class StoreAuthFailed(StoreError):
    """User, password, certificate or permission was refused."""


class RequestTooLarge(StoreError):
    """More operations or bytes than the store takes in one request."""


class StoreFull(StoreError):
    """The store's space quota is exhausted (etcd alarm NOSPACE)."""


class LeaseNotFound(StoreError):
    """A put named a lease that has ended."""


class StoreMisuse(StoreError):
    """The store refused a malformed request: a bug of ours."""


# -- session and volume ---------------------------------------------------------------------------------------------


class SessionLost(MetadataError):
    """The session's lease has ended or can no longer be proven: nothing more may be changed in its name.

    `in_doubt`: what was asked for may have been done before that, as its reply was lost.
    """

    def __init__(self, message: str, *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class DeadlineExceeded(MetadataError):
    """An operation did not come to an end in the time it was given; its outcome is in the message."""


class NotFormatted(MetadataError):
    """There is no volume under this name."""


class AlreadyFormatted(MetadataError):
    """There is a volume under this name already."""


class UnsupportedFormat(MetadataError):
    """The volume, or a record in it, was written by a newer version."""


class UnknownSite(MetadataError):
    """The volume has no site of this name."""


class SiteInUse(MetadataError):
    """The site can't be removed: mounts or bodies depend on it."""


class SiteLeaving(MetadataError):
    """The site is being removed: nobody may begin to use it."""


class CollectorBusy(MetadataError):
    """Garbage of this volume is being collected already; the message says by whom."""


class ChangesLost(MetadataError):
    """Part of the change log is gone: compacted before it was archived, or past its retention.

    The log can be had again from `first` on, as text of a position.
    """

    def __init__(self, message: str, first: str) -> None:
        super().__init__(message)
        self.first = first


class RoleLost(MetadataError):
    """Somebody else archives, or reads for the group, by now: the lease has ended. Nothing was changed since."""


class RoleTaken(MetadataError):
    """Somebody else archives, reads for the group, or applies retention; the message says who."""


class ArchiveUnavailable(MetadataError):
    """A segment of the change log can't be read or stored."""


class CorruptRecord(MetadataError):
    """A record does not decode."""


# -- the namespace --------------------------------------------------------------------------------------------------


class NamespaceError(MetadataError):
    """An operation on names or inodes is refused, as POSIX says."""


class NoSuchEntry(NamespaceError):
    """The name does not exist."""


class StaleInode(NamespaceError):
    """The inode number no longer names anything."""


class EntryExists(NamespaceError):
    """The name exists already."""


class RevisionConflict(NamespaceError):
    """A value is not the one that a conditional change of it was for: nothing was changed.

    `name` is its key, `revision` the one that it has now (0: there is none).
    """

    def __init__(self, name: bytes, revision: int) -> None:
        now = f"is at revision {revision}" if revision else "does not exist"
        super().__init__(f"'{name_text(name)}' {now}")
        self.name = name
        self.revision = revision


class NotADirectory(NamespaceError):
    """A directory is needed."""


class IsADirectory(NamespaceError):
    """A directory is refused."""


class DirectoryNotEmpty(NamespaceError):
    """The directory has entries."""


class NameTooLong(NamespaceError):
    """A name is longer than 255 bytes, or a symlink target longer than 4,095."""


class InvalidArgument(NamespaceError):
    """The request makes no sense: unknown flags, a directory moved into itself, an empty name."""


class OperationNotPermitted(NamespaceError):
    """An immutable or append-only inode forbids it, or a directory may not be linked."""


class Sealed(NamespaceError):
    """The inode, or the directory whose names would change, is in a sealed tree."""


class HoldsSealed(NamespaceError):
    """A sealed tree lies below the directory, whose name, owner and mode therefore stay."""


class SealRefused(NamespaceError):
    """The tree can't be sealed or unsealed; the message says why."""


class PermissionRefused(NamespaceError):
    """The caller's credentials do not allow it."""


class TooManyLinks(NamespaceError):
    """An inode has as many links as it can have."""


class FileTooLarge(NamespaceError):
    """An offset or a size past the largest one."""


class NoSuchAttribute(NamespaceError):
    """The extended attribute does not exist."""


class AttributeExists(NamespaceError):
    """The extended attribute exists already (XATTR_CREATE)."""


class AttributeTooLarge(NamespaceError):
    """Name over 255 bytes, value over 64 KiB, or more attributes than an inode may have."""


class NotSupported(NamespaceError):
    """The operation or flag is not supported here."""


class QuotaExceeded(NamespaceError):
    """A configured limit of the volume is reached."""


class LockConflict(NamespaceError):
    """Somebody else holds a conflicting lock, and the caller would not wait."""


class LockDeadlock(NamespaceError):
    """Waiting for this lock would wait for ever."""


class TooManyLocks(NamespaceError):
    """An owner or an inode has more locks than fit."""


# -- bodies ---------------------------------------------------------------------------------------------------------


class BodyConflict(MetadataError):
    """A commit can't be merged with what another mount has committed since; read the body again and prepare anew."""


class CloneSourceChanged(BodyConflict):
    """The file whose blobs were to be shared has lost one of them, or its name; look at it again."""


class TooManyExtents(MetadataError):
    """The file is too fragmented for one more extent; it must be rewritten in fewer pieces."""
