"""What packc asks of Triton where it compiles badly for a chip: decided here alone, by (Triton's version, chip).

Before 3.9 Triton's products for Hopper (wgmma) can come out wrong. Registers of a left operand that was computed are
written again while they are still read: by Triton before 3.7, and by every ptxas before 13.3, as it brings along. The
transpose of a product is misread as a left operand before 3.7.1. With more than four warps, some do not wait for others
that still read. Nearly all of packc's products have a computed left operand; so with such a Triton they are compiled as
for the chips before Hopper, which is right, and slower. DISABLE_MMA_V3, Triton's own switch, says otherwise: "0" has
them use wgmma all the same, with four warps where there is a choice.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

_SWITCH = "DISABLE_MMA_V3"  # read when a kernel is compiled, and part of the key under which it is kept
_SWITCHED = os.environ.get(_SWITCH)  # by the user
_RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])


def _miscompiles_wgmma(target: GPUTarget) -> bool:
    return (target.backend, target.arch) == ("cuda", 90) and _RELEASE < (3, 9)


def _before_hopper(target: GPUTarget) -> bool:
    return target.backend == "cuda" and target.arch < 90


def _as_before_hopper(target: GPUTarget) -> bool:
    """Whether products for Hopper are compiled as for the chips before it, which takes more registers than wgmma."""
    if (target.backend, target.arch) != ("cuda", 90):
        return False
    return _miscompiles_wgmma(target) if _SWITCHED is None else _SWITCHED.lower() in ("1", "on", "true")


def multiplies(kernel: Any) -> bool:
    """Whether a kernel multiplies matrices: those that do are told how."""
    return "PRECISION" in kernel.arg_names


def offered(
    kernel: Any, configs: list[triton.Config], before_hopper: list[triton.Config] | None, target: GPUTarget
) -> list[triton.Config]:
    """What is tried of a kernel's configurations."""
    if _before_hopper(target) or (multiplies(kernel) and _as_before_hopper(target)):
        return configs if before_hopper is None else before_hopper
    # On AMD a warp has 64 threads, so that eight have half the registers each.
    if multiplies(kernel) and (target.backend == "hip" or _miscompiles_wgmma(target)):
        configs = [config for config in configs if config.num_warps <= 4]
    return configs if limits_registers(target) else [_unlimited(config) for config in configs]


def limits_registers(target: GPUTarget) -> bool:
    """Whether a launch may say ``maxnreg``, which is an error elsewhere."""
    return target.backend == "cuda"


def _unlimited(config: triton.Config) -> triton.Config:
    return triton.Config(config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages)


def compiling(kernel: Any, target: GPUTarget) -> contextlib.AbstractContextManager[None]:
    """Within it, the kernel is compiled for the chip as it should be."""
    without = _SWITCHED is None and multiplies(kernel) and _miscompiles_wgmma(target)
    return _without_wgmma if without else _as_ever


class _WithoutWgmma(contextlib.AbstractContextManager[None]):
    """For the whole process: what other threads compile meanwhile does without as well."""

    def __init__(self) -> None:
        self._within = 0
        self._lock = threading.Lock()
        self._warned = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                os.environ[_SWITCH] = "1"
            self._within += 1
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"packc: triton {triton.__version__} may miscompile Hopper's matrix products (wgmma); packc's kernels "
                f"do without, which is slower. Triton 3.9 is sound; {_SWITCH}=0 uses wgmma whatever comes of it.",
                stacklevel=5,
            )

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                del os.environ[_SWITCH]


_without_wgmma, _as_ever = _WithoutWgmma(), contextlib.nullcontext()
