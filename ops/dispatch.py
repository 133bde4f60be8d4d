"""Which implementation of an op runs: decided at run time, so that compiled graphs follow ``packc.config.kernels``."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from packc import config
from packc.ops import cpu_library
from packc.ops.tritonsrc.launch import interpreted

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
    that cannot be honoured raises.
    """
    wanted = wanted_kernels()
    if wanted == "reference" or x.dtype == torch.float64:
        return "reference"
    runs = {"cpu": x.device.type == "cpu", "triton": x.device.type == ("cpu" if interpreted() else "cuda")}
    if x.dtype not in _DTYPES or (wanted != "auto" and not runs[wanted]):
        if wanted == "auto":
            return "reference"
        hint = "; only under TRITON_INTERPRET=1" if wanted == "triton" and x.device.type == "cpu" else ""
        raise ValueError(f'packc.config.kernels = "{wanted}": {op} got a {x.dtype} tensor on {x.device}{hint}')
    if wanted == "triton" or x.device.type == "cuda":
        return "triton" if runs["triton"] else "reference"
    if x.device.type != "cpu":
        return "reference"
    if not cpu_library.load(op):
        if wanted == "cpu":
            raise RuntimeError(f'packc.config.kernels = "cpu", but {op} did not build: {cpu_library.failure(op)}')
        return "reference"
    return "cpu"


def wanted_kernels() -> str:
    """``packc.config.kernels``, checked."""
    if _of_thread.reference_only:
        return "reference"
    if config.kernels not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f'packc.config.kernels must be "auto", "reference", "cpu" or "triton", not {config.kernels!r}')
    return config.kernels
