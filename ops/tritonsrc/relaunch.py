"""Launching a kernel again with arguments like those before: Triton's own way takes a microsecond or two an argument.

It asks of every argument by what it is compiled for, and its tuner for every dtype's name. For NVIDIA that is little: a
tensor's dtype and whether it is aligned, whether a number is 1, a multiple of 16, or long. What was compiled for these
is kept, and launched as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

# Whose kernels are compiled for no more than that, and for AMD's for more.
_RELEASES = ((3, 6), (3, 9))
_RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])


class Relaunched:
    """Of one kernel, tuned or not: what was launched last for arguments of each kind."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        function = kernel if isinstance(kernel, triton.JITFunction) else kernel.fn
        self._names = function.arg_names
        constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
        # And what is no parameter: how many warps, say.
        self._in_kind = {name for name in self._names if name not in constants | {*getattr(kernel, "keys", ())}}
        self._known: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __call__(self, device: torch.device, grid: Grid, arguments: dict[str, Any]) -> bool:
        """Whether it was launched: else :meth:`keep` what is."""
        known = self._known.get(self._kind(device, arguments))
        if known is None:
            return False
        compiled, chosen = known
        arguments = arguments | chosen
        grid = grid(arguments) if callable(grid) else grid
        compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in self._names])
        return True

    def keep(self, device: torch.device, arguments: dict[str, Any], compiled: Any) -> None:
        if isinstance(compiled, triton.compiler.CompiledKernel):
            config = getattr(self._kernel, "best_config", None)
            chosen = {} if config is None else config.all_kwargs()
            self._known[self._kind(device, arguments)] = compiled, chosen

    def _kind(self, device: torch.device, arguments: dict[str, Any]) -> tuple[Any, ...]:
        kinds: list[Any] = [device.index, *arguments]
        for name, x in arguments.items():
            kind = type(x)
            if kind is int and name in self._in_kind:
                kinds.append("1" if x == 1 else (x % 16 == 0, x.bit_length() > 31))
            elif kind is tuple and name in self._in_kind:
                kinds += ["1" if n == 1 else (n % 16 == 0, n.bit_length() > 31) for n in x]
            elif kind is torch.Tensor or isinstance(x, torch.Tensor):
                kinds += x.dtype, x.data_ptr() % 16 == 0
            else:
                kinds.append(kind if kind is float else x)
        return tuple(kinds)


@functools.cache
def relaunches() -> bool:
    """Whether it does: for the device that is current."""
    backend = triton.runtime.driver.active.get_current_target().backend
    return backend == "cuda" and _RELEASES[0] <= _RELEASE <= _RELEASES[1]
