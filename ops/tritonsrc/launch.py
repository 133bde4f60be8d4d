"""Launching and tuning Triton kernels: the one place that every launch goes through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from packc.ops.tritonsrc import chips
from packc.ops.tritonsrc.relaunch import Grid, Relaunched, relaunches


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when they were defined."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def autotuned(
    configs: list[triton.Config], key: list[str], before_hopper: list[triton.Config] | None = None
) -> Callable[[Any], Any]:
    """``triton.autotune`` over a short list whose winners are kept on disk.

    Args:
        configs: what is tried. The interpreter has nothing to time and takes the first.
        key: arguments that models fix (channels, states; dtypes follow by themselves), never a number of tokens: a
            batch of a new length must not tune again.
        before_hopper: what is tried instead on NVIDIA chips before sm_90, and where kernels are compiled as for them
            (``chips``): the compiler runs out of registers sooner.
    """

    def tune(kernel: Any) -> Any:
        if interpreted():
            return triton.autotune(configs=configs[:1], key=key)(kernel)

        def on_this_chip(_configs: list[triton.Config], _arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
            return tuned.offered(triton.runtime.driver.active.get_current_target())

        tuned = triton.autotune(
            configs=configs + (before_hopper or []),
            key=key,
            prune_configs_by={"early_config_prune": on_this_chip},
            cache_results=True,
        )(kernel)
        tuned.offered = functools.partial(chips.offered, kernel, configs, before_hopper)
        return tuned

    return tune


def taken(kernel: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments that many kernels share, those of ``kernel``."""
    return {name: value for name, value in shared.items() if name in kernel.arg_names}


def launch(kernel: Any, grid: Grid, **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the device of its tensors; nothing for an empty grid."""
    if not callable(grid) and 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    # Said aloud because Triton 3.10 changes the default.
    arguments["enable_fp_fusion"] = True
    if interpreted():
        kernel[grid](**arguments)
    elif device.type != "cuda" or device.index == torch.cuda.current_device():
        _launch_here(kernel, grid, device, arguments)
    else:
        with torch.cuda.device(device):
            _launch_here(kernel, grid, device, arguments)


def _launch_here(kernel: Any, grid: Grid, device: torch.device, arguments: dict[str, Any]) -> None:
    again = _relaunched(kernel) if relaunches() else None
    if again and again(device, grid, arguments):
        return
    target = triton.runtime.driver.active.get_current_target()
    if not chips.limits_registers(target):
        arguments.pop("maxnreg", None)
    with chips.compiling(kernel, target):
        compiled = kernel[grid](**arguments)
    if again:
        again.keep(device, arguments, compiled)


@functools.cache
def _relaunched(kernel: Any) -> Relaunched:
    return Relaunched(kernel)
