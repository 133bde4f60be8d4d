"""How kernels are compiled and chosen in the steps: what Triton found in its cache, and what was asked for."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import cases  # noqa: F401  (finds what the following imports)
import triton
from launches import tuned_kernels


def count_misses() -> Counter[str]:
    """From now on: how often each kernel was not in Triton's cache, under its name; hits under ``""``."""
    missed: Counter[str] = Counter()

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        missed["" if cache_hit else src.name] += 1

    triton.knobs.compilation.listener = listen
    return missed


def as_asked() -> None:
    """Kernels as a way of ``plan.py`` asks for them in the environment."""
    if channels := os.environ.get("PACKC_GPU_CHANNELS_BACK"):
        from packc.ops.selective_scan import triton_backward

        triton_backward._BLOCK_D = int(channels)
    if not (most := int(os.environ.get("PACKC_GPU_WARPS") or 0)):
        return
    for kernel in tuned_kernels():
        for config in kernel.configs:
            config.num_warps = min(config.num_warps, most)
