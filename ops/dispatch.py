"""Which implementation of an op runs: decided at run time, so that compiled graphs follow ``packc.config.kernels``."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch

from packc import config
from packc.ops import cpu_library
from packc.ops.triton_presence import interpreted, missing, present_or_warn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _OfThread(threading.local):
    reference_only = False


_of_thread = _OfThread()


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """On this thread, every op runs its reference, whatever is configured: torch differentiates that."""
    before, _of_thread.reference_only = _of_thread.reference_only, True
    try:
        yield
    finally:
        _of_thread.reference_only = before


def choose(op: str, x: torch.Tensor) -> str:
    """``"reference"``, ``"cpu"`` or ``"triton"``: what runs ``op`` for inputs like ``x``.

    ``op`` is also the C++ source's name. float64 always takes the reference. A forced choice (``packc.config.kernels``)
    that cannot be honoured raises. Who is told ``"triton"`` may import its Triton kernels, and with them triton; nobody
    does before.
    """
    wanted = wanted_kernels()
    if wanted == "reference" or x.dtype is torch.float64:
        return "reference"
    if wanted == "triton":
        _check_triton(op, x)
        return "triton"
    if wanted == "cpu":
        _check_cpu(op, x)
        return "cpu"
    if x.dtype not in _DTYPES:
        return "reference"
    if x.is_cuda:
        return "triton" if present_or_warn() and not interpreted() else "reference"
    if not x.is_cpu and not x.is_meta:
        _say_that_there_are_no_kernels(x.device.type)
    return "cpu" if x.is_cpu and cpu_library.load(op) else "reference"


@functools.cache
def _say_that_there_are_no_kernels(device: str) -> None:
    warnings.warn(f"packc: no kernels for {device}, so the slower reference runs there", stacklevel=3)


def _check_triton(op: str, x: torch.Tensor) -> None:
    if reason := missing():
        raise RuntimeError(f'packc.config.kernels = "triton", but {reason}')
    if x.dtype not in _DTYPES or x.device.type != ("cpu" if interpreted() else "cuda"):
        hint = "; only under TRITON_INTERPRET=1" if x.device.type == "cpu" else ""
        raise ValueError(f'packc.config.kernels = "triton": {op} got a {x.dtype} tensor on {x.device}{hint}')


def _check_cpu(op: str, x: torch.Tensor) -> None:
    if x.dtype not in _DTYPES or x.device.type != "cpu":
        raise ValueError(f'packc.config.kernels = "cpu": {op} got a {x.dtype} tensor on {x.device}')
    if not cpu_library.load(op):
        raise RuntimeError(f'packc.config.kernels = "cpu", but {op} did not build: {cpu_library.failure(op)}')


def wanted_kernels() -> str:
    """``packc.config.kernels``, checked."""
    if _of_thread.reference_only:
        return "reference"
    kernels = config.__getattr__("kernels")  # not config.kernels: looking for an attribute first costs as much again
    if kernels not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f'packc.config.kernels must be "auto", "reference", "cpu" or "triton", not {kernels!r}')
    return kernels
