"""Namespaces whose mounts are like the product's, but for one thing that a test wants otherwise."""

from __future__ import annotations

from tests.mounted.harness import Namespace


class EagerNamespace(Namespace):
    """Whose mounts take a directory again at once after a recall."""

    mount_module = "tests.support.eager_mount"


class OldKernelNamespace(Namespace):
    """Whose mounts are eager, and without INC_EPOCH, as before Linux 6.16."""

    mount_module = "tests.support.old_kernel_mount"


class RivalNamespace(Namespace):
    """Whose mounts take turns at once on a directory that several of them change."""

    mount_module = "tests.support.rival_mount"
