"""Every op with small inputs, and a call that differentiates all of its tensors: for tests of derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from mixers import MIXERS, Mixer, mixer
from selective_scan_data import offsets
from torch import Tensor

from packc import ops

LENGTHS = [3, 0, 4]
TOKENS = sum(LENGTHS)
INDEX = torch.tensor([0, 1, 2, 5, 6, 8, 9])  # of 7 tokens among 2 rows of 5


class Op(NamedTuple):
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[], dict[str, Tensor]]


# Further arguments and options, whose derivatives are others.
MORE = {
    "selective_scan": mixer("selective_scan", {"B": "B L G N", "C": "B L G N"}, D=4, N=3, G=2),
    "causal_conv1d": MIXERS["causal_conv1d"]._replace(options={"activation": "silu"}),
}


def _with_states(packed: bool) -> dict[str, Op]:
    states, how = (len(LENGTHS), {"cu_seqlens": offsets(LENGTHS)}) if packed else (1, {})

    def op(mixer: Mixer) -> Op:
        options = {**mixer.options, **how, "output_final_state": True}
        return Op(
            lambda **tensors: mixer.function(**tensors, **options),
            lambda: mixer.make(1, TOKENS) | {"initial_state": torch.randn(states, *mixer.state)},
        )

    return {name: op(each) for name, each in {**MIXERS, **MORE}.items()}


OPS = {
    **_with_states(packed=True),
    "varlen_attention": Op(
        lambda **tensors: ops.varlen_attention(**tensors, cu_seqlens=offsets(LENGTHS), window=3),
        lambda: {"q": torch.randn(1, 7, 2, 3), "k": torch.randn(1, 7, 1, 3), "v": torch.randn(1, 7, 1, 4)},
    ),
    "varlen_attention with all": Op(
        lambda **tensors: ops.varlen_attention(**tensors, cu_seqlens=offsets(LENGTHS), softcap=1.5),
        lambda: {
            "q": torch.randn(1, 7, 2, 3),
            "k": torch.randn(1, 7, 1, 3),
            "v": torch.randn(1, 7, 1, 4),
            "sinks": torch.randn(2),
            "relative_bias": torch.randn(1, 7, 2, 3),
        },
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
