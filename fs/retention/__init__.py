"""Checkpoint retention: which checkpoints of a training run stay, and how the others go.

Nouns:

- *step*: the number in a checkpoint's name; a *kind*: such a name without its numbers (`names`).
- *checkpoint*: all names of one step in one directory, files or directories; a directory's checkpoints are a *series*
  (`series`).
- *hold*: why a checkpoint stays whatever the policy says: it is incomplete, open, sealed, named by `latest`. Some are
  seen in the listing (`series`), the others by looking at all that is in it (`looking`).
- *verdict*: whether it goes, and why or why not (`verdicts`, a pure function).
- *carrying out* a verdict: the checkpoint goes if what the verdict rests on is as it was read, else that is read again
  (`carrying`).
- *parked*: moved out of sight, in one transaction; what nobody has opened since is removed from there (`parking`).

`applying` puts them together. Policies are `metadata/retention.py`.
"""

from __future__ import annotations

from .applying import ApplyOptions, apply_retention
from .report import RetentionReport

__all__ = ["ApplyOptions", "RetentionReport", "apply_retention"]
