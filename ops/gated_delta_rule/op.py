"""``packc::gated_delta_rule`` and ``packc::gated_delta_rule_bwd``: schemas, fakes, FLOPs and autograd.

The forward also returns the states between chunks, flattened: see ``chunk_states_shape`` of linear attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, documents
from packc.ops.flops import flop_formula
from packc.ops.gated_delta_rule import kernels
from packc.ops.linear_attention.reference import CHUNK, chunk_states_shape, state_dtype
from packc.ops.mixer import Mixer, declare

_lib = torch.library.Library("packc", "FRAGMENT")
_lib.define(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor? cu_seqlens, "
    "Tensor? initial_state, bool output_final_state) -> (Tensor out, Tensor final_state, Tensor chunk_states)"
)
_lib.define(
    "gated_delta_rule_bwd(Tensor dout, Tensor? dfinal_state, Tensor chunk_states, Tensor q, Tensor k, Tensor v, "
    "Tensor g, Tensor beta, float scale, Tensor? cu_seqlens, Tensor? initial_state) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)"
)
_ENTER = ("k", "v", "beta")
declare(Mixer("gated_delta_rule", per_token=("q", "k", "v", "g", "beta"), enter_state=_ENTER, gives_zero=_ENTER))


def _forward_fake(
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
    dtype = state_dtype(q, k, v, g, beta, initial_state)
    states = documents.count(cu_seqlens, v) if output_final_state else 0
    return (
        v.new_empty(v.shape),
        v.new_empty((states, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype),
        v.new_empty((math.prod(chunk_states_shape(k, v)),), dtype=dtype),
    )


def _backward(
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
) -> tuple[Tensor, ...]:
    grads = kernels.backward(dout, dfinal_state, chunk_states, q, k, v, g, beta, scale, cu_seqlens, initial_state)
    return tuple(v.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
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
) -> tuple[Tensor, ...]:
    return tuple(v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, beta, initial_state))


for _key in ("CPU", "CUDA"):
    _lib.impl("gated_delta_rule", kernels.forward, _key)
    _lib.impl("gated_delta_rule_bwd", _backward, _key)
torch.library.register_fake("packc::gated_delta_rule", _forward_fake, lib=_lib)
torch.library.register_fake("packc::gated_delta_rule_bwd", _backward_fake, lib=_lib)


# ---- FLOPs, of the chunked algorithm ---------------------------------------------------------------------------------


@flop_formula(torch.ops.packc.gated_delta_rule)
def _forward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """k k^T and q k^T of every group; of every head two products of chunks with values, and three with the state."""
    rows, tokens, groups, K = q_shape
    heads, V = v_shape[2:]
    return 2 * rows * tokens * (CHUNK * 2 * (groups * K + heads * V) + 3 * heads * K * V)


@flop_formula(torch.ops.packc.gated_delta_rule_bwd)
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
    """Both of keys again; of every head five products of chunks with values, four with keys, and seven with states."""
    rows, tokens, groups, K = q_shape
    heads, V = v_shape[2:]
    of_chunks = CHUNK * (2 * groups * K + heads * (5 * V + 4 * K))
    return 2 * rows * tokens * (of_chunks + 7 * heads * K * V)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, ctx.scale, cu_seqlens, initial_state, ctx.output_final_state = inputs
    ctx.save_for_backward(output[2], q, k, v, g, beta, cu_seqlens, initial_state)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    chunk_states, q, k, v, g, beta, cu_seqlens, initial_state = ctx.saved_tensors
    dq, dk, dv, dg, dbeta, dinitial_state = torch.ops.packc.gated_delta_rule_bwd.default(
        v.new_zeros(v.shape) if dout is None else dout,
        dfinal_state if ctx.output_final_state else None,
        chunk_states,
        q,
        k,
        v,
        g,
        beta,
        ctx.scale,
        cu_seqlens,
        initial_state,
    )
    return dq, dk, dv, dg, dbeta, None, None, None if initial_state is None else dinitial_state, None


derivatives.register(_lib, "gated_delta_rule", kernels.forward, _setup_context, _autograd)
derivatives.register_gradients(_lib, "gated_delta_rule_bwd", _backward)
