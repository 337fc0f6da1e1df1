"""`scripts/demo-sites` tells its story to the end, and finds everything as it says; nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.harness import ROOT

pytestmark = [pytest.mark.mounted, pytest.mark.slow]
DEADLINE_S = 420
CHAPTERS = (
    "three buckets",
    "policies",
    "training at A",
    "weights are published",
    "a dataset of B is sealed",
    "A's store stops",
    "the member of etcd that leads is killed",
    "C is cut off",
    "everything comes back",
    "taking it down",
)
SEEN = (
    "has copies of all",
    "published v2: 4 MiB copied to C",
    "read all 3 checkpoints",
    "all three see what each has done",
    "unsealed reads by path fail with EIO",
    "making a file fails with EIO",
    "none saw the old value",
    "the save that waited is done",
    "backlog 0 and lag 0 at all sites",
    "All of it was as it should be.",
)


def test_the_story_is_true(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    words = [str(ROOT / "scripts/lib/demo_sites.py"), "--directory", str(tmp_path / "demo"), "--json", str(told)]
    done = subprocess.run(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    timeline = json.loads(told.read_text())
    found = timeline["chapters"]
    assert len(found) == len(CHAPTERS)
    assert all(title.startswith(expected) for title, expected in zip(found, CHAPTERS, strict=True)), found
    lines = "\n".join(moment["text"] for moment in timeline["moments"])
    for text in SEEN:
        assert text in lines
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
