"""Fixtures of the unit tests."""

from tests.support.filesystems import pair

__all__ = ["pair"]
