"""Fixtures of the fault tests."""

from tests.support.filesystems import pair

__all__ = ["pair"]
