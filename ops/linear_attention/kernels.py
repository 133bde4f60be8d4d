"""The kernel behind linear attention and SSD: which implementation runs, under one signature."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from packc.ops import dispatch, documents
from packc.ops.arguments import check_shapes
from packc.ops.linear_attention import reference
from packc.ops.linear_attention.reference import Gradients

NAME = "linear_attention"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    value_major: bool,
    round_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``; arguments as in ``reference.py``, the last as ``chunk_states_shape`` says.

    ``out`` is in v's dtype, or as it was computed if not ``round_out``.
    """
    check_sizes(NAME, q, k, v, {"g": g, "step": step}, cu_seqlens, initial_state, value_major)
    choice = _choose(q, k, v, g, step, skip, initial_state)
    options = (output_final_state, value_major, round_out)
    if choice == "reference":
        return reference.forward(q, k, v, g, step, skip, scale, cu_seqlens, initial_state, *options)
    per_head = (fp32(g), fp32(step), _dense(skip), scale, cu_seqlens, fp32(initial_state))
    if choice == "cpu":
        return torch.ops.packc_cpu.linear_attention(q, k, v, *per_head, *options)
    q, k, wide_v = alike(q, k, v)
    from packc.ops.linear_attention import triton_forward

    out, final_state, chunk_states = triton_forward.forward(q, k, wide_v, *per_head, *options)
    return out.to(v.dtype) if round_out else out, final_state, chunk_states


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    value_major: bool,
) -> Gradients:
    """All contiguous and in their arguments' dtypes."""
    check_sizes(NAME, q, k, v, {"g": g, "step": step}, cu_seqlens, initial_state, value_major)
    arguments = (q, k, v, g, step, skip, initial_state)
    choice = _choose(*arguments)
    if choice == "reference":
        return reference.backward(
            dout, dfinal_state, q, k, v, g, step, skip, scale, cu_seqlens, initial_state, value_major
        )
    per_head = (fp32(g), fp32(step), _dense(skip), scale, cu_seqlens, fp32(initial_state), value_major)
    if choice == "cpu":
        grads = torch.ops.packc_cpu.linear_attention_bwd(dout, fp32(dfinal_state), chunk_states, q, k, v, *per_head)
    else:
        dout, q, k, v = alike(dout, q, k, v)
        from packc.ops.linear_attention import triton_backward

        grads = triton_backward.backward(dout, fp32(dfinal_state), chunk_states, q, k, v, *per_head)
    like = [None if x is None else grad.to(x.dtype) for x, grad in zip(arguments, grads, strict=True)]
    return Gradients._make(like)


def check_sizes(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_heads: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    value_major: bool = False,
) -> None:
    """Raises for sizes that do not fit, which a compiled graph may only know when it runs; kernels rely on them."""
    rows, tokens, heads, V = v.shape
    groups, K = q.shape[2:]
    state = (documents.count(cu_seqlens, v), heads, *((V, K) if value_major else (K, V)))
    wanted: dict[str, tuple[int, ...]] = {"q": (rows, tokens, groups, K), "k": (rows, tokens, groups, K)}
    wanted |= dict.fromkeys(of_heads, (rows, tokens, heads)) | {"initial_state": state}
    if (g := of_heads["g"]) is not None and g.ndim == 4:  # the delta rule's, per channel
        wanted["g"] = (rows, tokens, heads, K)
    check_shapes(op, {"q": q, "k": k, "v": v, **of_heads, "initial_state": initial_state}, wanted, "q", "v")
    if groups and heads % groups:
        raise ValueError(f"{op}: q's {groups} heads do not divide v's {heads}")


def _choose(q: Tensor, *others: Tensor | None) -> str:
    # One fp64 argument makes fp64 states, which are the reference's.
    wide = reference.state_dtype(q, *others) == torch.float64
    return "reference" if wide else dispatch.choose(NAME, q)


def fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In one dtype: Triton multiplies bf16 by bf16 as it is, everything else in fp32."""
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(common) for x in tensors)
