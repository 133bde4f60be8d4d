"""``packc::linear_attention`` and ``packc::linear_attention_bwd``: schemas, fakes, FLOPs and autograd.

The forward also returns the states between chunks, flattened: see ``reference.chunk_states_shape``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, documents
from packc.ops.flops import flop_formula
from packc.ops.linear_attention import kernels, reference
from packc.ops.mixer import Mixer, declare

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? g, float scale, Tensor? cu_seqlens, Tensor? initial_state, "
    "bool output_final_state) -> (Tensor out, Tensor final_state, Tensor chunk_states)"
)
_lib.define(
    "linear_attention_bwd(Tensor dout, Tensor? dfinal_state, Tensor chunk_states, Tensor q, Tensor k, Tensor v, "
    "Tensor? g, float scale, Tensor? cu_seqlens, Tensor? initial_state) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dinitial_state)"
)
declare(Mixer("linear_attention", per_token=("q", "k", "v", "g"), enter_state=("k", "v"), gives_zero=("k", "v")))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(
        q, k, v, g, None, None, scale, cu_seqlens, initial_state, output_final_state, value_major=False
    )


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.state_dtype(q, k, v, g, initial_state)
    states = documents.count(cu_seqlens, v) if output_final_state else 0
    return (
        v.new_empty(v.shape),
        v.new_empty((states, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype),
        v.new_empty((math.prod(reference.chunk_states_shape(k, v)),), dtype=dtype),
    )


def _backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    grads = kernels.backward(
        dout, dfinal_state, chunk_states, q, k, v, g, None, None, scale, cu_seqlens, initial_state, value_major=False
    )
    found = (grads.q, grads.k, grads.v, grads.g, grads.initial_state)
    return tuple(v.new_empty(0) if grad is None else grad for grad in found)


def _backward_fake(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, initial_state))


for _key in ("CPU", "CUDA"):
    _lib.impl("linear_attention", _forward, _key)
    _lib.impl("linear_attention_bwd", _backward, _key)
torch.library.register_fake("packc::linear_attention", _forward_fake, lib=_lib)
torch.library.register_fake("packc::linear_attention_bwd", _backward_fake, lib=_lib)


# ---- FLOPs, of the chunked algorithm ---------------------------------------------------------------------------------


def forward_flops(q_shape: Any, v_shape: Any) -> int:
    """q k^T of every group; scores times v, q times the state, k^T v, of every head."""
    rows, tokens, groups, K = q_shape
    heads, V = v_shape[2:]
    return 2 * rows * tokens * (reference.CHUNK * (groups * K + heads * V) + 2 * heads * K * V)


def backward_flops(q_shape: Any, v_shape: Any) -> int:
    """q k^T again; of every head do v^T and the other four products of chunks, and four with states."""
    rows, tokens, groups, K = q_shape
    heads, V = v_shape[2:]
    of_chunks = reference.CHUNK * (groups * K + heads * (2 * V + 2 * K))
    return 2 * rows * tokens * (of_chunks + 4 * heads * K * V)


@flop_formula(torch.ops.packc.linear_attention)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return forward_flops(q_shape, v_shape)


@flop_formula(torch.ops.packc.linear_attention_bwd)
def _backward_flops(
    dout_shape: Any,
    dfinal_shape: Any,
    states_shape: Any,
    q_shape: Any,
    k_shape: Any,
    v_shape: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return backward_flops(q_shape, v_shape)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, ctx.scale, cu_seqlens, initial_state, ctx.output_final_state = inputs
    ctx.save_for_backward(output[2], q, k, v, g, cu_seqlens, initial_state)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    chunk_states, q, k, v, g, cu_seqlens, initial_state = ctx.saved_tensors
    dq, dk, dv, dg, dinitial_state = torch.ops.packc.linear_attention_bwd.default(
        v.new_zeros(v.shape) if dout is None else dout,
        dfinal_state if ctx.output_final_state else None,
        chunk_states,
        q,
        k,
        v,
        g,
        ctx.scale,
        cu_seqlens,
        initial_state,
    )
    return (
        dq,
        dk,
        dv,
        None if g is None else dg,
        None,
        None,
        None if initial_state is None else dinitial_state,
        None,
    )


derivatives.register(_lib, "linear_attention", _forward, _setup_context, _autograd)
derivatives.register_gradients(_lib, "linear_attention_bwd", _backward)
