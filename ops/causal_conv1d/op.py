"""``packc::causal_conv1d`` and ``packc::causal_conv1d_bwd``.

The op keeps nothing but its inputs for the backward, which computes the pre-activation again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.mixer import Example, Mixer
from packc.ops.registration import declare
from packc.ops.shapes import FLOATING


def _check(op: str, tensors: Mapping[str, Tensor | None], cu_seqlens: Tensor | None) -> None:
    x, weight, bias, initial_state = tensors["x"], tensors["weight"], tensors["bias"], tensors["initial_state"]
    assert x is not None
    assert weight is not None

    def refused(x: Tensor, expected: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"{op}: {expected}; got {tuple(x.shape)} of {x.dtype}")

    if x.ndim != 3 or x.dtype not in FLOATING:
        raise refused(x, "x must be (B, L, D) and floating", ValueError if x.dtype in FLOATING else TypeError)
    D = x.shape[2]
    if weight.ndim != 2 or documents.differ(weight.shape[0], D) or weight.shape[1] < 1:
        raise refused(weight, f"weight must be (D, W) with D = {D} and W >= 1")
    if bias is not None and (bias.ndim != 1 or documents.differ(bias.shape[0], D)):
        raise refused(bias, f"bias must be (D,) with D = {D}")
    documents.check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        sizes = (documents.count(cu_seqlens, x), D, weight.shape[1] - 1)
        if initial_state.ndim != 3 or any(map(documents.differ, initial_state.shape, sizes)):
            raise refused(initial_state, f"initial_state must be (N, D, W - 1) = {sizes}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise refused(tensor, f"{name} must be floating", TypeError)


def _forward(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *rest: Any
) -> tuple[Tensor, ...]:
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
        check=_check,
        forward=_forward,
        backward=_backward,
        example=Example({"D": 3, "W": 4}),
        flops=_flops,
        # The pre-activation once more, and the gradients of the input and of the taps.
        backward_flops=lambda **sizes: 3 * _flops(**sizes),
        # Any strides are read in place, and those of the results do not depend on them: Inductor need not copy.
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
)
