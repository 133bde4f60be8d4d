"""Processes that stay, and run one function after another on the first so many gloo ranks: to start them is dear."""

from __future__ import annotations

import io
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
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
        self.folder, self.starts = folder, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        store = f"file://{self.folder}/store{self.starts}"
        self.found = PROCESSES.Queue()
        self.work = [PROCESSES.Queue() for _ in range(WORLD)]
        self.processes = [
            PROCESSES.Process(target=_serve, args=(rank, store, self.work[rank], self.found), daemon=True)
            for rank in range(WORLD)
        ]
        for process in self.processes:
            process.start()

    def run(self, work: Callable[..., Any], size: int, *args: Any, timeout: float = 400) -> list[Any]:
        """What ``work(group, *args)`` returned on each of ``size`` ranks; a function at the top of its module."""
        job = bytes(ForkingPickler.dumps((work, size, args)))  # here, where it raises: a queue would drop it
        for inbox in self.work[:size]:
            inbox.put(job)
        results: dict[int, Any] = {}
        ends = time.monotonic() + timeout
        while len(results) < size:
            try:
                rank, error, result = self.found.get(timeout=1)
            except queue.Empty:
                self._check(work, size, list(results), time.monotonic() > ends)
            else:
                results[rank] = RuntimeError(error) if error else torch.load(io.BytesIO(result), weights_only=False)
        for error in results.values():
            if isinstance(error, RuntimeError):
                raise error
        return [results[rank] for rank in range(size)]

    def _check(self, work: Callable[..., Any], size: int, came: list[int], late: bool) -> None:
        """Raises where ranks are gone, or late; others take their places."""
        codes = [process.exitcode for process in self.processes[:size]]
        if late or any(code is not None for code in codes):
            self.stop()
            self.start()
            raise TimeoutError(f"{work.__name__}: ranks {came} came; exit codes of the {size} are {codes}")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(rank: int, store: str, inbox: Any, outbox: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups = {size: dist.new_group(range(size)) for size in range(1, WORLD + 1)}
    while True:
        job = inbox.get()
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            work, size, args = pickle.loads(job)
            found = io.BytesIO()
            torch.save(work(groups[size], *args), found)
            outbox.put((rank, None, found.getvalue()))
        except Exception:
            outbox.put((rank, f"on rank {rank}:\n{traceback.format_exc()}", None))
