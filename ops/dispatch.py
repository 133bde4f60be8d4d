"""Which implementation of an op runs: decided at run time, so that compiled graphs follow ``packc.config.kernels``."""

import torch

from packc import config
from packc.ops import cpu_library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, x: torch.Tensor) -> str:
    """``"reference"`` or ``"cpu"``: what runs ``op`` for inputs like ``x``. ``op`` is also the C++ source's name.

    float64 always takes the reference. A forced choice (``packc.config.kernels``) that cannot be honoured raises.
    """
    wanted = config.kernels
    if wanted not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f'packc.config.kernels must be "auto", "reference", "cpu" or "triton", not {wanted!r}')
    if wanted == "triton":
        raise NotImplementedError(f'packc.config.kernels = "triton": {op} has no Triton kernel')
    if wanted == "reference" or x.dtype == torch.float64:
        return "reference"
    if x.device.type != "cpu" or x.dtype not in _DTYPES:
        if wanted == "cpu":
            raise ValueError(f'packc.config.kernels = "cpu": {op} got a {x.dtype} tensor on {x.device}')
        return "reference"
    if not cpu_library.load(op):
        if wanted == "cpu":
            raise RuntimeError(f'packc.config.kernels = "cpu", but {op} did not build: {cpu_library.failure(op)}')
        return "reference"
    return "cpu"
