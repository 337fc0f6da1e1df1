"""The one kind of error that is meant for a person: what they must put right, in one line."""

from __future__ import annotations


class UserError(Exception):
    """The message is the line that the person sees: it names what is wrong and, where that helps, what to do.

    It never holds a credential, and never a line break.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def leaves(exc: BaseException) -> list[BaseException]:
    """The exceptions in a (nested) group, or the exception itself."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for inner in exc.exceptions for leaf in leaves(inner)]
    return [exc]
