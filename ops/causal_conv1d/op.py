"""``packc::causal_conv1d`` and ``packc::causal_conv1d_bwd``.

The op keeps nothing but its inputs for the backward, which computes the pre-activation again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packc.ops.mixer import Mixer
from packc.ops.registration import declare


def _forward(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *rest: Any
) -> Sequence[Tensor]:
    return kernels.forward(x, weight, bias, activation is not None, *rest)


def _backward(
    kernels: Any,
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *rest: Any,
) -> Sequence[Tensor | None]:
    return kernels.backward(dout, dfinal_state, x, weight, bias, activation is not None, *rest)


def _flops(B: int, L: int, D: int, W: int, **_: Any) -> int:
    return 2 * B * L * D * W


MIXER = declare(
    Mixer(
        "causal_conv1d",
        tensors={"x": "B L D", "weight": "D W", "bias?": "D"},
        like="x",
        options={"activation": "str?"},
        state="D W-1",
        enter_state=("x",),
        gives_zero=("x",),
        unless=("bias",),
        forward=_forward,
        backward=_backward,
        flops=_flops,
        # The pre-activation once more, and the gradients of the input and of the taps.
        backward_flops=lambda **sizes: 3 * _flops(**sizes),
        # Any strides are read in place, and those of the results do not depend on them: Inductor need not copy.
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
)
