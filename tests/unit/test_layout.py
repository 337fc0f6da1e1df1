"""Rules of the tree that neither ruff nor import-linter can state."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.running_order import COMPUTING, WAITING

ROOT = Path(__file__).parents[2]
PACKAGES = ("blobstore", "fs", "metadata")
GENERATED = ("metadata/etcdrpc/*_pb2.py", "metadata/etcdrpc/*_pb2_grpc.py")
LINES_MAX = 450

# Who may import a library: its adapter, so that replacing the library touches one place.
ADAPTERS = {
    "boto3": ("blobstore/s3*.py",),
    "botocore": ("blobstore/s3*.py",),
    "obstore": ("blobstore/s3*.py",),
    "etcd3": ("metadata/etcd*.py", "metadata/etcdrpc/*"),
    "grpc": ("metadata/etcd*.py", "metadata/etcdrpc/*"),
    "google": ("metadata/etcd*.py", "metadata/etcdrpc/*"),
    "msgpack": ("metadata/codec.py",),
    "pyfuse3": ("fs/operations*.py", "fs/wire*.py", "fs/fastloop.py"),
    "click": ("fs/cli/*",),
    "rich": ("fs/cli/*",),
    "confluent_kafka": ("fs/change_kafka.py",),
    "matplotlib": ("fs/sizing/plots.py",),
}


def is_generated(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in GENERATED)


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> Iterator[tuple[str, Path]]:
    """Files written by hand, each with its path below the root."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in suffixes and path.is_file() and not is_generated(name):
                yield name, path


@functools.cache
def imported(tree: ast.AST) -> tuple[str, ...]:
    """Every module that is imported anywhere in a file, by its full name."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
    return tuple(found)


@functools.cache
def tree_of(name: str, path: Path) -> ast.Module:
    """Parsed once for all tests here."""
    return ast.parse(path.read_bytes(), name)


def parsed(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for name, path in sources(*folders):
        yield name, tree_of(name, path)


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """The trees are large: they go when these tests are over."""
    yield
    tree_of.cache_clear()
    imported.cache_clear()


def test_the_import_name_is_no_folder_here() -> None:
    assert not (ROOT / "apollofs").exists()


def test_every_package_says_what_it_holds() -> None:
    folders = {path.parent for _, path in sources(*PACKAGES)}
    lacking = []
    for folder in sorted(folders):
        init = folder / "__init__.py"
        text = ast.get_docstring(ast.parse(init.read_bytes())) if init.exists() else None
        if not text or "__all__" not in init.read_text():
            lacking.append(folder.relative_to(ROOT).as_posix())
    assert not lacking, "no __init__.py with a docstring and __all__"


def test_every_module_says_what_it_is_for() -> None:
    lacking = [name for name, tree in parsed(*PACKAGES, "tests", "scripts") if not ast.get_docstring(tree)]
    assert not lacking


def test_no_file_is_too_long_to_read() -> None:
    every = sources(*PACKAGES, "tests", "scripts", suffixes=(".py", ".c", ".h", ".sh"))
    lengths = {name: path.read_text().count("\n") for name, path in every}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_MAX} == {}


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_only_the_adapter_imports_its_library(library: str) -> None:
    strangers = [
        name
        for name, tree in parsed(*PACKAGES)
        if any(module.split(".")[0] == library for module in imported(tree))
        and not any(fnmatch(name, pattern) for pattern in ADAPTERS[library])
    ]
    assert not strangers


def test_packages_are_imported_by_their_full_names() -> None:
    short = {
        name: module
        for name, tree in parsed(*PACKAGES, "tests", "scripts")
        for module in imported(tree)
        if module.split(".")[0] in PACKAGES
    }
    assert short == {}


def test_only_the_command_line_reads_the_environment() -> None:
    readers = [
        name
        for name, tree in parsed(*PACKAGES)
        if not name.startswith("fs/cli/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
    ]
    assert not readers


def test_nothing_is_left_to_do() -> None:
    word = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    every = sources(*PACKAGES, "tests", "scripts", suffixes=(".py", ".c", ".h", ".sh"))
    marked = [name for name, path in every if path != Path(__file__) and word.search(path.read_text())]
    assert not marked


def test_files_that_begin_first_are_there() -> None:
    assert [name for name in (*WAITING, *COMPUTING) if not (ROOT / "tests" / name).is_file()] == []


def test_no_test_waits_by_the_clock_or_is_skipped() -> None:
    banned = {("time", "sleep"), ("pytest", "skip"), ("pytest", "importorskip"), ("mark", "skip"), ("mark", "skipif")}
    found = []
    for name, tree in parsed("tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                owner_name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if (owner_name, node.attr) in banned:
                    found.append(f"{name}:{node.lineno}")
    assert not found
