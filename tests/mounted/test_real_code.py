"""Libraries that people use, on two real mounts: what is saved through one is loaded through the other."""

from __future__ import annotations

import mmap
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from filelock import FileLock, SoftFileLock, Timeout
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.faults.mount_faults import content, until
from tests.mounted.client import Client

pytestmark = pytest.mark.mounted
MIB = 1 << 20
WAIT_S = 60.0
ROUNDS = 12
"""Transactions, or locks, of each of two processes."""


Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# -- arrays -----------------------------------------------------------------------------------------------------------


def test_safetensors(here: Path, there: Path) -> None:
    for version in (1, 2):
        saved: dict[str, Array] = {
            "embedding": numbers(version, 1000, 700),
            "bias": numbers(version + 10, 7),
            "steps": np.arange(version * 1000, dtype=np.int64),
            "nothing": np.zeros((0, 3), dtype=np.float16),
        }
        save_file(saved, here / "model.safetensors", metadata={"version": str(version)})
        loaded = load_file(there / "model.safetensors")
        assert loaded.keys() == saved.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(loaded[name], array)
        with safe_open(there / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"version": str(version)}
            np.testing.assert_array_equal(file.get_slice("embedding")[500:510, 3:9], saved["embedding"][500:510, 3:9])


def test_memmap_of_an_array(here: Path, there: Path) -> None:
    """Made by stores into a mapping on one mount, changed in place by stores on the other."""
    wanted = numbers(1, 600, 2000)
    made = np.lib.format.open_memmap(here / "array.npy", mode="w+", dtype=np.float32, shape=wanted.shape)
    for row in range(0, 600, 100):
        made[row : row + 100] = wanted[row : row + 100]
    made.flush()
    np.testing.assert_array_equal(np.load(there / "array.npy", mmap_mode="r"), wanted)
    changed = np.load(there / "array.npy", mmap_mode="r+")
    changed[250:260] = wanted[250:260] = 7
    changed.flush()
    np.testing.assert_array_equal(np.load(here / "array.npy"), wanted)
    del made, changed


def test_archives_of_arrays(here: Path, there: Path) -> None:
    arrays: dict[str, Array] = {"one": numbers(1, 300, 300), "two": np.arange(5)}
    np.savez(here / "plain.npz", allow_pickle=False, **arrays)
    np.savez_compressed(here / "small.npz", allow_pickle=False, **arrays)
    for name in ("plain.npz", "small.npz"):
        with np.load(there / name) as loaded:
            for key, array in arrays.items():
                np.testing.assert_array_equal(loaded[key], array)


def test_a_mapping_of_a_file_that_is_larger_than_the_cache(here: Path, there: Path) -> None:
    """What is touched comes, without the rest: ten GiB, most of them a hole, in a cache of one."""
    size = 10 << 30
    pieces = {0: content(1, 2 * MIB), size // 2 - 100: content(2, 3 * MIB), size - MIB: content(3, MIB)}
    with (here / "model").open("wb") as made:
        made.truncate(size)
        for at, piece in pieces.items():
            os.pwrite(made.fileno(), piece, at)
    for path in (there / "model", here / "model"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert len(mapped) == size
            for at, piece in pieces.items():
                assert mapped[at : at + len(piece)] == piece
            assert mapped[size // 3 : size // 3 + MIB] == bytes(MIB)


# -- datasets ---------------------------------------------------------------------------------------------------------


def read_shards(shards: list[str]) -> list[dict[str, Any]]:
    """In a process of its own: webdataset leaves what it has read to be closed by whoever collects garbage."""
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode())


def test_webdataset_shards(here: Path, there: Path, client: Client) -> None:
    samples = [
        {"__key__": f"{n:05d}", "bin": content(n, 20_000 + n), "cls": n % 10, "json": {"n": n}} for n in range(60)
    ]
    with webdataset.ShardWriter(f"{here}/shard-%02d.tar", maxsize=400_000, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    shards = sorted(str(path) for path in there.iterdir())
    assert len(shards) > 2
    loaded = client.call(read_shards, shards)
    for sample, found in zip(samples, loaded, strict=True):
        assert {key: found[key] for key in sample} == sample


# -- locks ------------------------------------------------------------------------------------------------------------


def add_under_a_lock(directory: Path, times: int) -> None:
    for _ in range(times):
        with FileLock(directory / "total.lock", timeout=WAIT_S, poll_interval=0.002):
            total = int((directory / "total").read_text())
            (directory / "total").write_text(str(total + 1))


def test_filelock_excludes_over_two_mounts(here: Path, there: Path, client: Client, other_client: Client) -> None:
    (here / "total").write_text("0")
    running = [
        client.start(add_under_a_lock, here, ROUNDS),
        other_client.start(add_under_a_lock, there, ROUNDS),
    ]
    for each in running:
        each.result()
    assert (here / "total").read_text() == (there / "total").read_text() == str(2 * ROUNDS)


@pytest.mark.parametrize("kind", [FileLock, SoftFileLock])
def test_who_does_not_get_a_filelock_hears_so(here: Path, there: Path, kind: type[FileLock | SoftFileLock]) -> None:
    with kind(here / "lock"), pytest.raises(Timeout):
        kind(there / "lock", timeout=0).acquire()
    with kind(there / "lock", timeout=0):
        pass


# -- SQLite with a rollback journal ---------------------------------------------------------------------------------


def database(path: Path) -> sqlite3.Connection:
    """Transactions are begun and ended by hand."""
    connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    assert connection.execute("pragma journal_mode=delete").fetchone() == ("delete",)
    connection.execute("pragma synchronous=full")
    return connection


def made_database(path: Path, rows: int) -> None:
    with closing(database(path)) as on:
        on.execute("create table total (value integer)")
        on.execute("create table line (who text, number integer, body blob)")
        on.execute("begin")
        on.execute("insert into total values (0)")
        on.executemany("insert into line values ('first', ?, ?)", [(n, content(n, 3000)) for n in range(rows)])
        on.execute("commit")


def add_in_transactions(path: Path, who: str, times: int) -> None:
    with closing(database(path)) as on:
        for number in range(times):
            on.execute("begin immediate")
            (total,) = on.execute("select value from total").fetchone()
            on.execute("insert into line values (?, ?, ?)", (who, number, content(number, 5000)))
            on.execute("update total set value = ?", (total + 1,))
            on.execute("commit")


def change_everything_and_stop(path: Path) -> None:
    """A transaction that is larger than SQLite's cache, so that it is in the file, not ended; the process stays so."""
    on = database(path)
    on.execute("pragma cache_size=5")
    on.execute("begin immediate")
    on.execute("update line set body = zeroblob(3000)")
    on.execute("update total set value = -1")
    UNFINISHED.append(on)


UNFINISHED: list[sqlite3.Connection] = []
"""Open transactions of this process."""


def contents(path: Path) -> tuple[int, list[tuple[str, int, bytes]]]:
    with closing(database(path)) as on:
        assert on.execute("pragma integrity_check").fetchall() == [("ok",)]
        (total,) = on.execute("select value from total").fetchone()
        return total, on.execute("select who, number, body from line order by who, number").fetchall()


def test_sqlite_loses_no_update_of_two_mounts(here: Path, there: Path, client: Client, other_client: Client) -> None:
    made_database(here / "db", 3)
    running = [
        client.start(add_in_transactions, here / "db", "west", ROUNDS),
        other_client.start(add_in_transactions, there / "db", "east", ROUNDS),
    ]
    for each in running:
        each.result()
    lines = [(who, n, content(n, 5000)) for who in ("east", "west") for n in range(ROUNDS)]
    first = [("first", n, content(n, 3000)) for n in range(3)]
    for path in (here / "db", there / "db"):
        assert contents(path) == (2 * ROUNDS, sorted(lines + first))
    assert sorted(os.listdir(there)) == ["db"]


def test_sqlite_rolls_back_what_a_killed_writer_left(here: Path, there: Path, client: Client) -> None:
    """Another mount finds the journal, and half of the transaction in the file, and puts the file right."""
    made_database(there / "db", 100)
    before = contents(here / "db")
    client.call(change_everything_and_stop, here / "db")
    assert (there / "db-journal").exists()
    client.kill()
    until(lambda: (there / "db").read_bytes().count(bytes(2000)) > 50, "what the transaction wrote is in the file")
    assert contents(there / "db") == before
    assert contents(here / "db") == before
    assert sorted(os.listdir(here)) == ["db"]
