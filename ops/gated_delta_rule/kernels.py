"""Which implementation of the gated delta rule runs, under one signature."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops import dispatch
from packc.ops.gated_delta_rule import reference
from packc.ops.gated_delta_rule.reference import Gradients
from packc.ops.linear_attention.kernels import alike, check_sizes, fp32
from packc.ops.linear_attention.reference import state_dtype

NAME = "gated_delta_rule"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``, the last as ``chunk_states_shape`` says."""
    check_sizes(NAME, q, k, v, {"g": g, "beta": beta}, cu_seqlens, initial_state)
    choice = _choose(q, k, v, g, beta, initial_state)
    if choice == "reference":
        return reference.forward(q, k, v, g, beta, scale, cu_seqlens, initial_state, output_final_state)
    rest = (g.float(), beta.float(), scale, cu_seqlens, fp32(initial_state), output_final_state)
    if choice == "cpu":
        return torch.ops.packc_cpu.gated_delta_rule(q, k, v, *rest)
    q, k, wide_v = alike(q, k, v)
    from packc.ops.gated_delta_rule import triton_forward

    out, final_state, chunk_states = triton_forward.forward(q, k, wide_v, *rest)
    return out.to(v.dtype), final_state, chunk_states


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Gradients:
    """All contiguous and in their arguments' dtypes."""
    check_sizes(NAME, q, k, v, {"g": g, "beta": beta}, cu_seqlens, initial_state)
    arguments = (q, k, v, g, beta, initial_state)
    choice = _choose(*arguments)
    if choice == "reference":
        return reference.backward(dout, dfinal_state, q, k, v, g, beta, scale, cu_seqlens, initial_state)
    rest = (g.float(), beta.float(), scale, cu_seqlens, fp32(initial_state))
    if choice == "cpu":
        grads = torch.ops.packc_cpu.gated_delta_rule_bwd(dout, fp32(dfinal_state), chunk_states, q, k, v, *rest)
    else:
        dout, q, k, v = alike(dout, q, k, v)
        from packc.ops.gated_delta_rule import triton_backward

        grads = triton_backward.backward(dout, fp32(dfinal_state), chunk_states, q, k, v, *rest)
    like = [None if x is None else grad.to(x.dtype) for x, grad in zip(arguments, grads, strict=True)]
    return Gradients._make(like)


def _choose(q: Tensor, *others: Tensor | None) -> str:
    # One fp64 argument makes fp64 states, which are the reference's.
    return "reference" if state_dtype(q, *others) == torch.float64 else dispatch.choose(NAME, q)
