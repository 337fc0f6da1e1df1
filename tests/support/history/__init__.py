"""Histories of what processes did on several mounts, and whether one order of them explains all that was seen.

    check(operations)       # raises NotLinearizable with the shortest account of what nothing explains

`records.py` is what is written down, `namespace.py` what each operation does and may see, `search.py` the checker.
"""

from tests.support.history.records import TOKEN_BYTES, Kind, Operation
from tests.support.history.search import NotLinearizable, Undecided, check

__all__ = ["TOKEN_BYTES", "Kind", "NotLinearizable", "Operation", "Undecided", "check"]
