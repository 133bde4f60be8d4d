"""The C++ kernels (``csrc/selective_scan.cpp``). They read strided fp32, bf16 and fp16 inputs in place."""

import torch
from torch import Tensor

NAME = "selective_scan"


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.packc_cpu.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, output_final_state
    )


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    channel_first_ddelta: bool,
) -> tuple[Tensor, ...]:
    return torch.ops.packc_cpu.selective_scan_bwd(
        dout,
        dfinal_state,
        chunk_states,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        cu_seqlens,
        initial_state,
        channel_first_ddelta,
    )
