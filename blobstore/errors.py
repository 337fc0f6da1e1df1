"""What can go wrong in a blob store. Leaves name facts; errno belongs to `fs/errno_map.py` alone."""

from __future__ import annotations


class BlobStoreError(Exception):
    """Root of the tree."""


class NoSuchBlob(BlobStoreError):
    """No object has this name."""


class RangeUnavailable(BlobStoreError):
    """The object is shorter than the range asked for."""


class CorruptBlob(BlobStoreError):
    """The bytes read are not the bytes written: a checksum or a length does not match."""


class BlobStoreUnavailable(BlobStoreError):
    """The store could not be reached, answered 5xx or 429, or broke off; trying again may help."""


class BlobStoreTimeout(BlobStoreUnavailable):
    """The deadline ended first."""


class BlobStoreRefused(BlobStoreError):
    """Credentials, permissions or the bucket's name were refused; trying again will not help."""


class BlobStoreFull(BlobStoreError):
    """No space, or a quota is reached."""


class BadBlobURL(BlobStoreError):
    """The URL of a store does not parse; the message says what is wrong and shows a good one."""


class BadBlobName(BlobStoreError):
    """The name isn't a relative path of allowed characters: a caller's bug, or a damaged record."""
