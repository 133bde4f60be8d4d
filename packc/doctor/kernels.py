"""Whether every op's kernels give what its reference gives in fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from packc import config, ops
from packc.doctor.finding import Finding
from packc.ops import cpu_library, testing, triton_presence
from packc.ops.mixer import MIXERS, Mixer

_LENGTHS = [5, 0, 64, 1, 60]  # on both sides of a chunk
_TOLERANCE = 1e-5
"""Of fp32 kernels, relative to the largest entry."""


def kernels() -> Iterator[Finding]:
    for name, mixer in sorted(MIXERS.items()):
        if cpu_library.load(mixer.kernels or name) if mixer.implementations is None else True:
            yield _agreement(mixer, "cpu", torch.device("cpu"))
        if torch.cuda.is_available() and not triton_presence.missing():
            yield _agreement(mixer, "triton", torch.device("cuda"))


def _agreement(mixer: Mixer, kernels: str, device: torch.device) -> Finding:
    what = f"{mixer.name} on {device.type}"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        inputs = {name: x.to(device) for name, x in testing.inputs(mixer, 1, sum(_LENGTHS)).items()}
    try:
        with config.patch(kernels=kernels):
            results = _results(mixer, inputs)
    except Exception as error:  # whatever a driver or compiler raises
        return Finding("fail", what, f"{type(error).__name__}: {error}")
    with config.patch(kernels="reference"):
        exact = _results(mixer, {name: x.double() for name, x in inputs.items()})
    errors = {name: _relative(results[name], exact[name]) for name in exact}
    worst = max(errors, key=errors.__getitem__)
    right = errors[worst] <= _TOLERANCE
    return Finding("ok" if right else "fail", what, f"within {errors[worst]:.0e} of fp64 ({worst})")


def _results(mixer: Mixer, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``out``, and the gradient of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    device = next(iter(leaves.values())).device
    offsets = torch.tensor([0, *_LENGTHS], device=device).cumsum(0).to(torch.int32)
    with torch.enable_grad():
        out = getattr(ops, mixer.name)(**leaves, **mixer.example.options, cu_seqlens=offsets)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view_as(out).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"out": out.detach(), **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


def _relative(x: Tensor, exact: Tensor) -> float:
    difference = (x.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()
