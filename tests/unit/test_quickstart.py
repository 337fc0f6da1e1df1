"""What the quickstart takes down of an earlier run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "lib" / "quickstart.py"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    spec.loader.exec_module(module)
    return module


class Recorded:
    """Plays the command `apollofs`."""

    def __init__(self) -> None:
        self.commands: list[tuple[object, ...]] = []

    def run(self, *arguments: object) -> str:
        self.commands.append(arguments)
        return ""


@pytest.mark.parametrize(
    ("files", "down"),
    [([], False), (["lock"], False), (["lock", "etcd"], True), (["lock", "etcd", "apollofs.json"], True)],
)
def test_only_what_was_brought_up_is_taken_down(
    quickstart: ModuleType, tmp_path: Path, files: list[str], down: bool
) -> None:
    """`lock` alone is left where the first `up` was interrupted, and `down` refuses that directory."""
    layout = quickstart.Layout(tmp_path)
    layout.volume.mkdir()
    for name in files:
        (layout.volume / name).touch()
    apollofs = Recorded()
    quickstart.take_down(apollofs, layout)
    assert apollofs.commands == ([("down", layout.volume)] if down else [])
