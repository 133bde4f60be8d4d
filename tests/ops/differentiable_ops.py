"""Every op with small inputs, and a call that differentiates all of its tensors: for tests of derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from mixers import MIXERS
from selective_scan_data import offsets
from torch import Tensor

from packc import ops

LENGTHS = [3, 0, 4]
TOKENS = sum(LENGTHS)
INDEX = torch.tensor([0, 1, 2, 5, 6, 8, 9])  # of 7 tokens among 2 rows of 5


class Op(NamedTuple):
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[], dict[str, Tensor]]


def _selective_scan(states: int) -> dict[str, Tensor]:
    D, N = 4, 3
    return {
        **{name: torch.randn(1, TOKENS, D) for name in ("u", "delta", "z")},
        **{name: torch.randn(1, TOKENS, 2, N) for name in ("B", "C")},
        "A": -torch.rand(D, N) - 0.1,
        "D": torch.randn(D),
        "delta_bias": torch.randn(D),
        "initial_state": torch.randn(states, D, N),
    }


def _causal_conv1d(states: int) -> dict[str, Tensor]:
    D, W = 4, 3
    return {
        "x": torch.randn(1, TOKENS, D),
        "weight": torch.randn(D, W),
        "bias": torch.randn(D),
        "initial_state": torch.randn(states, D, W - 1),
    }


def _with_states(packed: bool) -> dict[str, Op]:
    states, how = (len(LENGTHS), {"cu_seqlens": offsets(LENGTHS)}) if packed else (1, {})

    def op(function: Callable, make: Callable[[], dict[str, Tensor]], **options: object) -> Op:
        return Op(lambda **tensors: function(**tensors, **how, **options, output_final_state=True), make)

    def mixer(name: str) -> Op:
        function, make, state, _, options = MIXERS[name]
        return op(function, lambda: make(1, TOKENS) | {"initial_state": torch.randn(states, *state)}, **options)

    return {
        **{name: mixer(name) for name in MIXERS},
        "selective_scan": op(ops.selective_scan, lambda: _selective_scan(states), delta_softplus=True),
        "causal_conv1d": op(ops.causal_conv1d, lambda: _causal_conv1d(states), activation="silu"),
    }


OPS = {
    **_with_states(packed=True),
    "varlen_attention": Op(
        lambda **tensors: ops.varlen_attention(**tensors, cu_seqlens=offsets(LENGTHS), window=3),
        lambda: {"q": torch.randn(1, 7, 2, 3), "k": torch.randn(1, 7, 1, 3), "v": torch.randn(1, 7, 1, 4)},
    ),
    "pack": Op(lambda x: ops.pack(x, INDEX), lambda: {"x": torch.randn(2, 5, 3)}),
    "unpack": Op(lambda x: ops.unpack(x, INDEX, 2, 5), lambda: {"x": torch.randn(1, 7, 3)}),
}
PADDED = _with_states(packed=False)
"""Those that take rows without ``cu_seqlens``."""


def scalar(op: Op, names: "list[str] | dict[str, Tensor]") -> Callable[..., Tensor]:
    """Of all results; nonlinear, so that linear ops have second derivatives too."""

    def call(*values: Tensor) -> Tensor:
        results = op.call(**dict(zip(names, values, strict=True)))
        results = results if isinstance(results, tuple) else (results,)
        return sum(torch.sin(y).double().sum() for y in results)

    return call
