"""Loads the wire hook and pyfuse3, in the one order that works.

The hook interposes a libfuse function that pyfuse3 calls.  The dynamic linker binds that call when pyfuse3 is loaded,
so the hook must already be there, with its symbols global.  Every module that needs pyfuse3 takes it from here:

    from apollofs.fs.wire_load import pyfuse3

Importing this after somebody else has imported pyfuse3 raises ImportError: without the hook, flock and fcntl locks
would silently hold on one host only.
"""

from __future__ import annotations

import os
import sys

if "pyfuse3" in sys.modules and "apollofs.fs._fusewire" not in sys.modules:
    raise ImportError("pyfuse3 was imported before apollofs.fs.wire_load: import it from there instead")

_flags_before = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from apollofs.fs import _fusewire as hook
finally:
    sys.setdlopenflags(_flags_before)

import pyfuse3  # noqa: E402  (after the hook, as said above)

__all__ = ["hook", "pyfuse3"]
