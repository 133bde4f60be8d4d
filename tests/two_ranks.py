"""Runs a function on two gloo processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import PROCESSES

WORLD = 2


def on_two_ranks(work: Callable[..., Any], folder: Path, *args: Any, timeout: float = 240) -> list[Any]:
    """What ``work(rank, *args)`` returned on each rank; ``work`` is a function at the top of its module."""
    how = PROCESSES.get_start_method()
    processes = mp.start_processes(_run, (work, folder, args), nprocs=WORLD, join=False, start_method=how)
    deadline = time.monotonic() + timeout
    while not processes.join(deadline - time.monotonic(), grace_period=5):  # returns at the end of each process
        if time.monotonic() >= deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} took more than {timeout} s on two ranks")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _run(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        torch.save(work(rank, *args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
