"""Hugging Face datasets: saved on one mount; loaded, mapped and filtered on another, with its caches in the mount too.

usage: hf_datasets.py DIRECTORY SAME_DIRECTORY_ON_ANOTHER_MOUNT [ROWS]      (needs datasets)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator


def rows(count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        yield {"number": number, "text": f"line {number} " * 20, "vector": [float(number % 7)] * 64}


def main() -> None:
    here, there = sys.argv[1:3]
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 100_000
    os.environ.update(HF_HOME=f"{here}/home", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from datasets import Dataset, load_dataset, load_from_disk  # which reads the environment now

    began = time.perf_counter()
    made = Dataset.from_generator(rows, gen_kwargs={"count": count}, cache_dir=f"{here}/made")
    made.save_to_disk(f"{here}/saved", num_shards=4, num_proc=2)
    made.to_parquet(f"{here}/saved.parquet")
    print(f"{count} rows saved in {time.perf_counter() - began:.1f} s")

    began = time.perf_counter()
    loaded = load_from_disk(f"{there}/saved")
    assert len(loaded) == count
    assert loaded[count // 2] == made[count // 2]
    longer = loaded.map(
        lambda row: {"length": len(row["text"])},
        num_proc=2,
        cache_file_name=f"{there}/mapped.arrow",
        new_fingerprint="m",
    )
    assert longer[: count // 10]["length"] == [len(text) for text in made[: count // 10]["text"]]
    assert longer.filter(lambda row: row["number"] % 1000 == 0, cache_file_name=f"{there}/few.arrow").num_rows == (
        (count + 999) // 1000
    )
    parquet = load_dataset("parquet", data_files=f"{there}/saved.parquet", split="train", cache_dir=f"{there}/parquet")
    assert parquet[count - 1] == made[count - 1]
    assert sum(batch["number"].sum() for batch in parquet.with_format("numpy").iter(5000)) == count * (count - 1) // 2
    print(f"loaded, mapped, filtered and read as parquet on the other mount in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
