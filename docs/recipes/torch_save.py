"""torch.save on one mount, torch.load on another, whole and mapped.

usage: torch_save.py DIRECTORY SAME_DIRECTORY_ON_ANOTHER_MOUNT [MIB]      (needs torch)
"""

from __future__ import annotations

import os
import sys
import time

import torch


def save(state: dict[str, torch.Tensor], path: str) -> None:
    """So that nobody ever sees half of it, and that it is durable on return."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.tmp", path)


def main() -> None:
    here, there = sys.argv[1:3]
    mib = int(sys.argv[3]) if len(sys.argv) > 3 else 512
    rows = mib * 2**20 // 4 // 4 // 1024
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        state = {f"layer{n}": torch.randn(rows, 1024, generator=generator) for n in range(4)}
        began = time.perf_counter()
        save(state, f"{here}/model.pt")
        saved_s = time.perf_counter() - began
        for how in ({"mmap": True}, {"mmap": False}, {"mmap": True}):
            began = time.perf_counter()
            loaded = torch.load(f"{there}/model.pt", weights_only=True, **how)
            first = float(loaded["layer2"][rows // 2, 5])
            first_s = time.perf_counter() - began
            assert first == float(state["layer2"][rows // 2, 5])
            assert loaded.keys() == state.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
            all_s = time.perf_counter() - began
            print(f"step {step}: saved in {saved_s:.2f} s; {how}: one value in {first_s:.3f} s, all in {all_s:.2f} s")


if __name__ == "__main__":
    main()
