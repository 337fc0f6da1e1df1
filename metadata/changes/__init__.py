"""The change log: every change of a volume's namespace, in order and without gaps, for as long as it is kept.

The nouns:

- a *position* is an etcd revision and an offset in it; every change has one, and they grow;
- a *record* is one change with its position, who made it where, and its path as of that time;
- the *live* log is the history of the journal slots in etcd, the *archive* is segments of it in a blob store;
- a *segment* is a compressed piece of the log; the *archive index* in etcd says which there are;
- the *archiver* moves the live log into segments; only what it has archived may be compacted;
- a *group* is a name under which one reader at a time goes on where the last one has stopped;
- a *role* is a key under a lease: it makes one process the archiver, or the reader of a group.
"""

from apollofs.metadata.changes.groups import ConsumerGroup, open_group
from apollofs.metadata.changes.log import Batch, ChangeLog
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.errors import ChangesLost

__all__ = ["Batch", "ChangeLog", "ChangeRecord", "ChangesLost", "ConsumerGroup", "Position", "open_group"]
