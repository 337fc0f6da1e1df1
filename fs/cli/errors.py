"""From any exception to the one line that a person sees."""

from __future__ import annotations

import click

from apollofs.blobstore.errors import BlobStoreError
from apollofs.fs.cli.output import one_line
from apollofs.fs.config import ConfigError
from apollofs.fs.user_error import UserError, leaves
from apollofs.metadata.errors import MetadataError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def describe(exc: BaseException) -> str:
    """One line. Of several exceptions at once, the one that says most to a person."""
    found = sorted(leaves(exc), key=_rank)[0]
    if isinstance(found, click.ClickException):
        text = found.format_message()
        if isinstance(found, click.UsageError) and found.ctx is not None:
            text = f"{text.rstrip('.')} (see {found.ctx.command_path} --help)"
    elif isinstance(found, (KeyboardInterrupt, click.Abort)):
        text = "interrupted; nothing more was done"
    elif isinstance(found, OSError) and found.strerror:
        text = f"{found.filename}: {found.strerror}" if found.filename else found.strerror
    elif _is_expected(found):
        text = str(found) or _in_words(type(found).__name__)
    else:
        text = f"internal error: {type(found).__name__}: {found} (--debug shows where)"
    return one_line(" ".join(text.split()))


def status_of(exc: BaseException) -> int:
    """2 for a wrong use of the command, 130 for Ctrl-C, else 1."""
    found = sorted(leaves(exc), key=_rank)[0]
    if isinstance(found, click.UsageError):
        return USAGE
    return INTERRUPTED if isinstance(found, (KeyboardInterrupt, click.Abort)) else FAILED


def is_bug(exc: BaseException) -> bool:
    """Whether a traceback would tell more than `describe` does."""
    return not all(
        isinstance(leaf, (click.ClickException, KeyboardInterrupt)) or _is_expected(leaf) for leaf in leaves(exc)
    )


def _is_expected(exc: BaseException) -> bool:
    return isinstance(exc, (UserError, ConfigError, MetadataError, BlobStoreError))


def _rank(exc: BaseException) -> int:
    if isinstance(exc, (UserError, click.ClickException, click.Abort)):
        return 0
    if _is_expected(exc):
        return 1
    return 2 if isinstance(exc, Exception) else 3


def _in_words(name: str) -> str:
    """StoreUnavailable -> "store unavailable"."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
