"""Where the log goes: a file of bounded size, or standard error. Every logger of apollofs is below `apollofs`."""

from __future__ import annotations

import logging
import os
import sys
import time
from logging.handlers import RotatingFileHandler

from apollofs.fs.user_error import UserError

ROOT_LOGGER = "apollofs"
FILE_BYTES_MAX = 16 << 20
FILES_KEPT = 3


class _UtcFormatter(logging.Formatter):
    """One line a record: UTC time with milliseconds, level, logger, text; tracebacks follow."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


def start_logging(path: str | None, *, debug: bool = False) -> logging.Handler:
    """Send apollofs's log to `path`, rotated at 16 MiB with three old files kept, or to standard error (None).

    Standard error is for `--foreground`. Records of other libraries go the same way from WARNING up. Raises UserError
    where the file can't be opened.
    """
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
            handler = RotatingFileHandler(path, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT)
        except OSError as exc:
            raise UserError(f"the log file {path} can't be written: {exc.strerror}") from exc
    handler.setFormatter(_UtcFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    everything = logging.getLogger()
    everything.addHandler(handler)
    everything.setLevel(logging.WARNING)
    logging.getLogger(ROOT_LOGGER).setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)
    return handler
