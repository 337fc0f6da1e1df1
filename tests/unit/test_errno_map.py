"""Every leaf of the three error trees has an errno, and nothing else has."""

from __future__ import annotations

import errno
import inspect
from types import ModuleType

import pytest

from apollofs.blobstore import errors as blob_errors
from apollofs.fs import errors as body_errors
from apollofs.fs.errno_map import ERRNO, errno_of
from apollofs.metadata import errors as metadata_errors

TREES = (blob_errors, body_errors, metadata_errors)


def classes_of(module: ModuleType) -> list[type[Exception]]:
    """The exceptions that a module defines."""
    found = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    return [one for one in found if issubclass(one, Exception) and one.__module__ == module.__name__]


def leaves_of(module: ModuleType) -> list[type[Exception]]:
    """Those of them that no other one refines."""
    classes = classes_of(module)
    return [one for one in classes if not any(other is not one and issubclass(other, one) for other in classes)]


@pytest.mark.parametrize("leaf", [leaf for tree in TREES for leaf in leaves_of(tree)])
def test_every_leaf_is_mapped_by_its_own_line(leaf: type[Exception]) -> None:
    assert leaf in ERRNO


@pytest.mark.parametrize("module", TREES)
def test_a_tree_has_leaves(module: ModuleType) -> None:
    assert len(leaves_of(module)) > 5


def test_every_errno_is_one_that_the_kernel_takes() -> None:
    assert {number for number in ERRNO.values() if number not in errno.errorcode} == set()


def test_what_is_no_error_of_ours_has_none() -> None:
    for bug in (
        ValueError("x"),
        KeyError(1),
        AssertionError(),
        OSError(errno.EACCES, "x"),
        metadata_errors.MetadataError(),
    ):
        assert errno_of(bug) is None


def test_instances_and_refinements_are_found() -> None:
    class Special(metadata_errors.NoSuchEntry):
        """A leaf below a leaf."""

    assert errno_of(metadata_errors.NoSuchEntry("x")) == errno.ENOENT
    assert errno_of(metadata_errors.Compacted("x", 3)) == errno.EIO
    assert errno_of(Special("x")) == errno.ENOENT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_local_disk_is_enospc(number: int) -> None:
    assert errno_of(OSError(number, "full")) == errno.ENOSPC


def test_groups() -> None:
    same = ExceptionGroup("", [metadata_errors.NoSuchEntry(), ExceptionGroup("", [metadata_errors.NoSuchEntry()])])
    mixed = ExceptionGroup("", [metadata_errors.NoSuchEntry(), metadata_errors.EntryExists()])
    bug = ExceptionGroup("", [metadata_errors.NoSuchEntry(), ValueError()])
    assert errno_of(same) == errno.ENOENT
    assert errno_of(mixed) == errno.EIO
    assert errno_of(bug) is None
