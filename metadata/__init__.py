"""Names, inodes, locks and history of a volume, kept in a strongly consistent store.

The nouns:

- a *Store* is an ordered, transactional key-value store (etcd; in memory for tests);
- a *Volume* is one namespace in it, opened by a mount at a *site*;
- a *Session* is one mount's life, bound to a lease, and its *journal slots* fence every transaction it makes;
- a *dentry* is a name in a directory; it embeds the *Inode* of a file that has one name, or refers to it;
- an *Extent* is a range of a file that is backed by part of a *blob*, which is a number here and nothing more;
- a *Lock* is an advisory lock that every mount sees;
- a *Violation* is what the whole-namespace checker reports.

Nothing here knows of FUSE, of errno or of where blobs are kept.
"""

from apollofs.metadata.errors import MetadataError
from apollofs.metadata.records import Extent, Inode
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume, open_volume

__all__ = ["Extent", "Inode", "MetadataError", "Store", "Volume", "open_volume"]
