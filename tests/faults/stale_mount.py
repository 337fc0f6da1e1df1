"""The command on a mount whose kernel keeps what was recalled, run as `apollofs` is.

The rule that is left out: caches, the kernel's too, go before the key.
"""

from __future__ import annotations

import sys

from apollofs.fs.cli.app import main
from apollofs.fs.kernel_cache import KernelCache


async def keep(self: KernelCache, group: int) -> None:
    """See the module."""
    self.discard(group)


if __name__ == "__main__":
    KernelCache.drop = keep  # type: ignore[method-assign]
    sys.exit(main())
