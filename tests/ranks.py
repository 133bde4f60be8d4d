"""Processes that stay, and run one function after another on the first so many gloo ranks: to start them is dear."""

from __future__ import annotations

import io
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["packc", "torch._dynamo"])  # once for all of them: seconds each


class Ranks:
    def __init__(self, folder: Path) -> None:
        self.found = PROCESSES.Queue()
        self.work = [PROCESSES.Queue() for _ in range(WORLD)]
        self.processes = [
            PROCESSES.Process(target=_serve, args=(rank, folder, self.work[rank], self.found), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def run(self, work: Callable[..., Any], size: int, *args: Any, timeout: float = 400) -> list[Any]:
        """What ``work(group, *args)`` returned on each of ``size`` ranks; a function at the top of its module."""
        for inbox in self.work[:size]:
            inbox.put((work, size, args))
        results: dict[int, Any] = {}
        try:
            while len(results) < size:
                rank, error, result = self.found.get(timeout=timeout)
                results[rank] = RuntimeError(error) if error else torch.load(io.BytesIO(result), weights_only=False)
        except queue.Empty:
            self.stop()
            raise TimeoutError(f"{work.__name__} took more than {timeout} s; only ranks {list(results)} came") from None
        for error in results.values():
            if isinstance(error, RuntimeError):
                raise error
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(rank: int, folder: Path, inbox: Any, outbox: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(range(size)) for size in range(1, WORLD + 1)}
    while True:
        work, size, args = inbox.get()
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            found = io.BytesIO()
            torch.save(work(groups[size], *args), found)
            outbox.put((rank, None, found.getvalue()))
        except Exception:
            outbox.put((rank, f"on rank {rank}:\n{traceback.format_exc()}", None))
