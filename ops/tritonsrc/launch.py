"""Launching and tuning Triton kernels: the one place that every launch goes through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when they were defined."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def autotuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """``triton.autotune`` over a short list whose winners are kept on disk.

    ``key`` names arguments that models fix (channels, states, dtypes follow by themselves), never a number of tokens:
    a batch of a new length must not tune again. The interpreter has nothing to time and takes the first config.
    """
    return triton.autotune(configs=configs[:1] if interpreted() else configs, key=key, cache_results=not interpreted())


def launch(kernel: Any, grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors; nothing for an empty grid."""
    if not callable(grid) and 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Said aloud because Triton 3.10 changes the default.
        kernel[grid](**arguments, enable_fp_fusion=True)
