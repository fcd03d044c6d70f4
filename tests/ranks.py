"""Real processes with gloo, for tests of what ranks do together."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def run_ranks(world: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `task(rank, *arguments)` on `world` ranks, each on one thread; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (world, folder, task, arguments), nprocs=world)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _work(rank: int, world: int, folder: str, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        result = task(rank, *arguments)
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
