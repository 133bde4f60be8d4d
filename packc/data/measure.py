"""What packing a corpus costs and leaves unused, and what ranks wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log
from time import perf_counter

import torch

from packc.data.sampler import PackingBatchSampler

Progress = Callable[[Iterable[list[list[int]]], int], Iterable[list[list[int]]]]


@dataclass(frozen=True)
class Measured:
    window: int
    balance: str
    waste: float
    """Of the budgets of all batches, the share without a token."""
    straggling: dict[str, float]
    """Of each cost, how much longer a step's slowest rank takes than all would if they shared its work evenly."""
    seconds: float
    batches: int


def log_normal(documents: int, budget: int, *, median: float = 400, sigma: float = 1.0, seed: int = 0) -> list[int]:
    """Lengths of documents as corpora have them, cut at the budget."""
    normal = torch.randn(documents, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normal * sigma + log(median)).exp().round().clamp(1, budget).long().tolist()


def measure(
    lengths: list[int], budget: int, *, window: int, balance: str, world_size: int, progress: Progress
) -> Measured:
    sampler = PackingBatchSampler(lengths, budget, window=window, balance=balance, rank=0, world_size=world_size)
    start, steps, documents = perf_counter(), [], len(lengths)
    for step in progress(sampler.steps(), documents):
        steps.append(step)
    seconds = perf_counter() - start
    batches = [batch for step in steps for batch in step]
    tokens = sum(lengths[n] for batch in batches for n in batch)
    straggling = {}
    for name, power in (("tokens", 1), ("attention", 2)):
        costs = [[sum(lengths[n] ** power for n in batch) for batch in step] for step in steps]
        straggling[name] = sum(map(max, costs)) * world_size / sum(map(sum, costs)) - 1
    return Measured(window, balance, 1 - tokens / (budget * len(batches)), straggling, seconds, len(batches))
