"""torch.distributed.checkpoint: half of the ranks save on one mount and half on another; each loads on the other one.

usage: torch_distributed_checkpoint.py DIRECTORY SAME_DIRECTORY_ON_ANOTHER_MOUNT [MIB [RANKS]]      (needs torch, numpy)
"""

from __future__ import annotations

import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def state_of(step: int, rows: int, ranks: int) -> dict[str, DTensor]:
    """What all ranks together hold: each has its share of the rows."""
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(step)
    whole = {f"layer{n}": torch.randn(rows, 1024, generator=generator) for n in range(4)}
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}


def work(rank: int, ranks: int, meeting: str, mounts: list[str], rows: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    mine, other = mounts[rank % 2], mounts[(rank + 1) % 2]
    for step in (1, 2):
        saved = state_of(step, rows, ranks)
        dist.barrier()
        began = time.perf_counter()
        dcp.save(saved, checkpoint_id=f"{mine}/step{step}")
        saved_s = time.perf_counter() - began
        loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
        began = time.perf_counter()
        dcp.load(loaded, checkpoint_id=f"{other}/step{step}")
        loaded_s = time.perf_counter() - began
        for name, tensor in saved.items():
            assert torch.equal(loaded[name].to_local(), tensor.to_local()), (step, rank, name)
        print(f"step {step}, rank {rank}: saved in {saved_s:.2f} s, loaded on the other mount in {loaded_s:.2f} s")
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    mounts = sys.argv[1:3]
    mib = int(sys.argv[3]) if len(sys.argv) > 3 else 512
    ranks = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (ranks, f"{directory}/meeting", mounts, mib * 2**20 // 4 // 4 // 1024), nprocs=ranks)


if __name__ == "__main__":
    main()
