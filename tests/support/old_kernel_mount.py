"""The command on an eager mount that believes to be on Linux 6.15 or older, run as `apollofs` is.

There FUSE_NOTIFY_INC_EPOCH is refused, and here it is never sent.
"""

from __future__ import annotations

import sys

from apollofs.fs.cli.app import main
from apollofs.fs.wire_device import Device
from tests.support.eager_mount import be_eager


def refused(self: Device) -> bool:
    """As `Device.inc_epoch` answers on such a kernel."""
    return False


if __name__ == "__main__":
    be_eager()
    Device.inc_epoch = refused  # type: ignore[method-assign]
    sys.exit(main())
