"""What names say: the step of a checkpoint, that something is not finished, which checkpoint a tracker file means."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from apollofs.fs.user_error import UserError

STEP = "{step}"
PATTERN_CHARS_MAX = 255
PATTERNS_MAX = 16
STEP_DIGITS_MAX = 18
USUAL = (
    rb"(?:^|.*?[._=-])(?:global[_-]?)?step[_=-]?(\d+)(?=$|[._-])",
    rb"^(?:checkpoint|ckpt|model\.ckpt)[_=-]?(\d+)(?=$|[._-])",
    rb"^(?:iter|iteration)[_=-]?(\d+)(?=$|[._-])",
    rb"(?:^|.*?[._-])ba(\d+)(?=$|[._-])",
    rb"(?:^|.*?[._-])epoch[_=-]?(\d+)(?=$|[._-])",
)
"""Of Lightning, DeepSpeed, Hugging Face, TensorFlow, Megatron, Composer; the first that fits a name says its step."""
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?")
_UNFINISHED = re.compile(
    rb"(?:^|[._-])(?:tmp|temp|partial|incomplete|writing|saving|in-?progress)(?:$|[._\d-])|\.part$|~$", re.IGNORECASE
)
_TRACKER = re.compile(rb"(?:latest|last)(?:[._-].*)?|checkpoint")
_WORDS = (re.compile(r"[^\s\"',;\[\]{}()]+"), re.compile(r"[^\s\"',;\[\]{}():=]+"))
"""Names of checkpoints may have `=` and `:` in them, and so may what stands before them."""


class Steps:
    """Finds the step in names, by patterns; none: the usual ones. Raises UserError for what is no pattern."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        if len(patterns) > PATTERNS_MAX:
            raise UserError(f"at most {PATTERNS_MAX} patterns, not {len(patterns)}")
        self._expressions = [re.compile(_expression(text)) for text in patterns]
        self._is_whole = bool(patterns)
        if not patterns:
            self._expressions = [re.compile(text) for text in USUAL]

    def find(self, name: bytes) -> tuple[int, bytes] | None:
        """The step that a name says, and the kind: what such names have in common. None: it is no checkpoint's."""
        for expression in self._expressions:
            found = expression.fullmatch(name) if self._is_whole else expression.match(name)
            if found is not None and len(found[1]) <= STEP_DIGITS_MAX:
                return int(found[1]), _kind(name[: found.start(1)], name[found.end(1) :])
        return None


def _kind(before: bytes, after: bytes) -> bytes:
    """What stands before the step, and the extension. The rest may be anything: ranks, losses, hashes."""
    _, dot, extension = after.rpartition(b".")
    return b"#".join(_NUMBER.sub(b"#", part) for part in (before, extension if dot else b""))


def _expression(pattern: str) -> bytes:
    """`*` is any characters, `?` one, `{step}` digits."""
    if pattern.count(STEP) != 1 or "/" in pattern or len(pattern) > PATTERN_CHARS_MAX:
        raise UserError(f"{pattern!r} is no pattern: a name with one {STEP} in it, like run-*-{STEP}.pt")
    before, after = (_wildcards(part) for part in pattern.split(STEP))
    return before + rb"(\d+)" + after


def _wildcards(text: str) -> bytes:
    found = re.escape(os.fsencode(text))
    return found.replace(rb"\*", b".*?").replace(rb"\?", b".")


def is_unfinished(name: bytes) -> bool:
    """Whether a name says that what it means is not finished: `step10.tmp`, `tmp-checkpoint-10`."""
    return _UNFINISHED.search(name) is not None


def is_tracker(name: bytes) -> bool:
    """Whether a file or link of this name says which checkpoint is the newest complete one: `latest`,
    `latest_checkpointed_iteration.txt`, `last.ckpt`, `checkpoint` of TensorFlow."""
    return _TRACKER.fullmatch(name) is not None


def means(text: bytes, step: int, names: Sequence[bytes]) -> bool:
    """Whether the text of a tracker, or a link's target, means a checkpoint: one of its names, the front of one up to a
    dot (`model.ckpt-10` for `model.ckpt-10.index`), or nothing but the step's number (Megatron)."""
    whole = os.fsdecode(text).strip()
    if whole.isdecimal() and int(whole[: STEP_DIGITS_MAX + 1]) == step:
        return True
    words = {whole, *(word for expression in _WORDS for word in expression.findall(whole))}
    meant = {os.fsencode(os.path.basename(word.rstrip("/"))) for word in words} - {b""}
    return any(name == word or name.startswith(word + b".") for name in names for word in meant)
