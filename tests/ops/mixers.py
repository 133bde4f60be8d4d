"""The mixers that share a contract, each with inputs for its tests; and a call together with all its gradients."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from selective_scan_data import make_inputs, offsets, relative_error, reproducible_like
from torch import Tensor

from packc import ops


class Mixer(NamedTuple):
    function: Callable
    make: Callable[[int, int], dict[str, Tensor]]  # of B and L: fp32, every argument that has a gradient but the states
    state: tuple[int, ...]  # of a document
    keeps_fp32: tuple[str, ...] = ()  # arguments that models keep in fp32 when all others are bf16
    options: Mapping = MappingProxyType({})

    def per_token(self) -> tuple[str, ...]:
        return tuple(name for name, x in self.make(1, 1).items() if x.ndim > 2)


def _attention(B: int, L: int, H: int = 2, G: int = 1, K: int = 5, V: int = 3) -> dict[str, Tensor]:
    q, k, v = torch.randn(B, L, G, K), torch.randn(B, L, G, K), torch.randn(B, L, H, V)
    return {"q": q, "k": k, "v": v, "g": F.logsigmoid(torch.randn(B, L, H) + 2)}


def _ssd(B: int, L: int, H: int = 2, G: int = 1, P: int = 3, N: int = 5) -> dict[str, Tensor]:
    return {
        "x": torch.randn(B, L, H, P),
        "dt": torch.randn(B, L, H),
        "A": -torch.rand(H) - 0.1,
        "B": torch.randn(B, L, G, N),
        "C": torch.randn(B, L, G, N),
        "D": torch.randn(H),
        "z": torch.randn(B, L, H, P),
        "dt_bias": torch.randn(H) - 1,
    }


def _linear_scan(B: int, L: int, D: int = 21) -> dict[str, Tensor]:
    return {"a": torch.sigmoid(torch.randn(B, L, D) + 2), "b": torch.randn(B, L, D)}


def _gated_delta_rule(B: int, L: int, H: int = 2, G: int = 1, K: int = 5, V: int = 3) -> dict[str, Tensor]:
    k = F.normalize(torch.randn(B, L, G, K), dim=-1)  # as in models; states grow without bound otherwise
    g, beta = F.logsigmoid(torch.randn(B, L, H) + 2), torch.rand(B, L, H)
    return {"q": torch.randn(B, L, G, K), "k": k, "v": torch.randn(B, L, H, V), "g": g, "beta": beta}


def _gated_delta_rule_per_channel(B: int, L: int, H: int = 2, G: int = 1, K: int = 5, V: int = 3) -> dict[str, Tensor]:
    return _gated_delta_rule(B, L, H, G, K, V) | {"g": F.logsigmoid(torch.randn(B, L, H, K) + 2)}


def _selective_scan(B: int, L: int, D: int = 3, N: int = 2) -> dict[str, Tensor]:
    return make_inputs(B, L, D, N)


def _convolution(B: int, L: int, D: int = 3, W: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(B, L, D), "weight": torch.randn(D, W), "bias": torch.randn(D)}


MIXERS = {
    "gated_delta_rule": Mixer(ops.gated_delta_rule, _gated_delta_rule, (2, 5, 3), ("g",)),
    "gated_delta_rule_per_channel": Mixer(ops.gated_delta_rule, _gated_delta_rule_per_channel, (2, 5, 3), ("g",)),
    "linear_attention": Mixer(ops.linear_attention, _attention, (2, 5, 3), ("g",)),
    "linear_scan": Mixer(ops.linear_scan, _linear_scan, (21,)),
    "causal_conv1d": Mixer(ops.causal_conv1d, _convolution, (3, 3)),
    "selective_scan": Mixer(
        ops.selective_scan, _selective_scan, (3, 2), ("A", "D", "delta_bias"), {"delta_softplus": True}
    ),
    "ssd": Mixer(ops.ssd, _ssd, (2, 3, 5), ("A", "D", "dt_bias"), {"dt_softplus": True, "dt_limit": (0.01, 2.0)}),
}


def _channel_first(B: int, L: int) -> dict[str, Tensor]:
    return _convolution(B, L) | {"x": torch.randn(B, 3, L).mT}


def _halves(B: int, L: int) -> dict[str, Tensor]:
    return {name: x.half() for name, x in _convolution(B, L).items()}


# Inputs for which other kernels run.
OTHERS = {
    "causal_conv1d of channel-first inputs": Mixer(ops.causal_conv1d, _channel_first, (3, 3)),
    "causal_conv1d of halves": Mixer(ops.causal_conv1d, _halves, (3, 3)),
}


def positions(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(offsets(lengths).tolist())]


def only(mixer: Mixer, inputs: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]:
    """The inputs of some tokens."""
    return {name: x[:, part] if name in mixer.per_token() else x for name, x in inputs.items()}


def in_dtype(mixer: Mixer, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    keep = () if dtype == torch.float64 else mixer.keeps_fp32
    return {name: x if name in keep else x.to(dtype) for name, x in inputs.items()}


def run(
    mixer: Mixer,
    inputs: dict[str, Tensor],
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    dout: Tensor | None = None,
    dfinal: Tensor | None = None,
    output_final_state: bool = True,
) -> dict[str, Tensor]:
    """``out``, ``final_state`` and ``d<name>`` of every input, for the given (or reproducible) output gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if state is not None:
        leaves["initial_state"] = state.detach().requires_grad_()
    call = mixer.function(**leaves, **mixer.options, cu_seqlens=cu_seqlens, output_final_state=output_final_state)
    results = dict(zip(("out", "final_state"), call if output_final_state else (call,), strict=False))
    douts = [
        reproducible_like(x) if grad is None else grad.to(x.dtype)
        for x, grad in zip(results.values(), (dout, dfinal), strict=False)
    ]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), douts)
    return {name: x.detach() for name, x in results.items()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def exactly(mixer: Mixer, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """In fp64, which the reference computes."""
    more = {name: _wide(x) for name, x in kwargs.items()}
    return run(mixer, in_dtype(mixer, inputs, torch.float64), *map(_wide, args), **more)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def assert_close(results: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    errors = {name: relative_error(x, exact[name]) for name, x in results.items()}
    assert all(error <= tolerance for error in errors.values()), errors
