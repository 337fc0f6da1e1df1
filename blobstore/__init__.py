"""Bodies: named, immutable byte strings in a site's S3 bucket or directory.

Nouns:

- *location*: where a site keeps its bodies; parsed from a BLOB_URL, kept in etcd without credentials (`url`).
- *blob store*: put, read, stat, delete, list; the port (`port`), its adapters (`s3_obstore`, `s3`, `local`, `memory`).
- *sealed object*: what is really stored: data and a footer of checksums (`footer`).
- *block store*: a blob store that seals and verifies, and reads parts of blocks of known length (`block_port`).
- *wrappers*: block stores around a store: `verify`, `retry`, `limit`, `metrics`; `open` puts them together.

Nothing here knows of files, inodes or etcd. Errors are leaves of `errors.BlobStoreError`.
"""

from __future__ import annotations

from .block_port import BlockStore
from .errors import (
    BadBlobName,
    BadBlobURL,
    BlobStoreError,
    BlobStoreFull,
    BlobStoreRefused,
    BlobStoreTimeout,
    BlobStoreUnavailable,
    CorruptBlob,
    NoSuchBlob,
    RangeUnavailable,
)
from .limit import Limits
from .metrics import BlobMetrics, Snapshot
from .open import BlobStoreOptions, open_blob_store, prepare_blob_store
from .port import BlobStat, BlobStore, Buffer
from .retry import RetryPolicy, hurried
from .url import LocalLocation, Location, S3Location, location_from_dict, parse_blob_url

__all__ = [
    "BlobStore",
    "BlockStore",
    "BlobStat",
    "Buffer",
    "Location",
    "S3Location",
    "LocalLocation",
    "parse_blob_url",
    "location_from_dict",
    "BlobStoreOptions",
    "RetryPolicy",
    "hurried",
    "Limits",
    "open_blob_store",
    "prepare_blob_store",
    "BlobMetrics",
    "Snapshot",
    "BlobStoreError",
    "NoSuchBlob",
    "RangeUnavailable",
    "CorruptBlob",
    "BlobStoreUnavailable",
    "BlobStoreTimeout",
    "BlobStoreRefused",
    "BlobStoreFull",
    "BadBlobURL",
    "BadBlobName",
]
