"""Fixtures of the unit tests."""

from tests.support.filesystems import pair
from tests.support.volumes import volumes

__all__ = ["pair", "volumes"]
