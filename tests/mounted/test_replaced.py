"""A name that other mounts replace as fast as they can: every open finds a whole file."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mounted.conftest import Places

pytestmark = pytest.mark.mounted
READS = 150


def test_no_open_fails_while_the_name_is_replaced(places: Places) -> None:
    (places.here / "f").write_bytes(b"0")
    ended = threading.Event()

    def replace(directory: Path, writer: int) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            (directory / f"new-{writer}").write_bytes(b"%d " % number * 50)
            os.rename(directory / f"new-{writer}", directory / "f")

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(replace, places.there, writer) for writer in range(3)]
        try:
            for _ in range(READS):
                words = (places.here / "f").read_bytes().split()
                assert len(set(words)) == 1
        finally:
            ended.set()
        for writer in writers:
            writer.result()
