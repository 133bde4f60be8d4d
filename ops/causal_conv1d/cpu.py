"""The C++ kernel (``csrc/causal_conv1d.cpp``) behind the op's signature."""

import torch
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    return torch.ops.packc_cpu.causal_conv1d.default(
        x, weight, bias, activation is not None, cu_seqlens, initial_state, output_final_state
    )


def causal_conv1d_bwd(
    dout: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.packc_cpu.causal_conv1d_bwd.default(
        dout, dfinal_state, x, weight, bias, activation is not None, cu_seqlens, initial_state
    )
