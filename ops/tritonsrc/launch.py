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


def autotuned(
    configs: list[triton.Config], key: list[str], ampere: list[triton.Config] | None = None
) -> Callable[[Any], Any]:
    """``triton.autotune`` over a short list whose winners are kept on disk.

    Args:
        configs: what is tried. The interpreter has nothing to time and takes the first.
        key: arguments that models fix (channels, states; dtypes follow by themselves), never a number of tokens: a
            batch of a new length must not tune again.
        ampere: what is tried instead on NVIDIA chips before sm_90, where the compiler runs out of registers sooner.
    """

    def on_this_chip(all_configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
        old = torch.version.hip is None and torch.cuda.get_device_capability() < (9, 0)
        return ampere if old and ampere is not None else configs

    def tune(kernel: Any) -> Any:
        if interpreted():
            return triton.autotune(configs=configs[:1], key=key)(kernel)
        tuned = triton.autotune(
            configs=configs + (ampere or []),
            key=key,
            prune_configs_by={"early_config_prune": on_this_chip},
            cache_results=True,
        )(kernel)
        tuned.shipped = {"ampere": ampere or configs, "later": configs}
        return tuned

    return tune


def launch(kernel: Any, grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors; nothing for an empty grid."""
    if not callable(grid) and 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Said aloud because Triton 3.10 changes the default.
        kernel[grid](**arguments, enable_fp_fusion=True)
