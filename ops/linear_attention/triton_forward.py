"""Linear attention's forward on Triton: the states between chunks, then every chunk's output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.chunks import chunk_states_shape
from packc.ops.common.triton_chunks import (
    chunk_of,
    chunks_of,
    countable,
    load_between,
    load_per_token,
    load_tile,
    shared_arguments,
    state_strides,
    store_tile,
    token_strides,
)
from packc.ops.common.triton_products import (
    between,
    dot,
    dot_by_computed,
    dot_computed,
    from_start,
    log_decays,
    select,
)
from packc.ops.linear_attention.triton_states import CONFIGS, block_of, carry_states, half_block_of
from packc.ops.tritonsrc.launch import autotuned, launch, taken


@autotuned(CONFIGS, key=["K", "V"], before_hopper=CONFIGS[:1])
@triton.jit(do_not_specialize=["slots", "q_b", "k_b", "v_b", "g_b", "step_b", "out_b"])
def _outputs(
    q,
    k,
    v,
    g,
    step,
    skip,  # (heads, V)
    table,
    kept,
    initial,
    out,
    scale,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    q_b,
    q_strides,
    k_b,
    k_strides,
    v_b,
    v_strides,
    g_b,
    g_strides,
    step_b,
    step_strides,
    initial_strides,
    out_b,
    out_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, _ = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        group = head // (heads // groups)
        first_v = tl.program_id(2) * BLOCK_V
        channels_v = first_v + tl.arange(0, BLOCK_V)
        slot = row * slots + token // CHUNK - 1
        entering = slot, document, first, head, heads, initial_strides
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        result = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for first_k in range(0, K, BLOCK_K):
            queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
            scores += dot(queries, tl.trans(keys), PRECISION)
            state = load_between(kept, initial, entering, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
            result += dot_by_computed(queries, state, PRECISION)
        t = tl.arange(0, CHUNK)
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            result *= from_start(coarse, fine)[:, None]
            weights = select(between(coarse, fine, CHUNK), scores)
        else:
            weights = tl.where(t[:, None] >= t[None, :], scores, 0.0)
        values = load_tile(v, row, token, head, length, v_b, v_strides, first_v, V, CHUNK, BLOCK_V)
        if step is not None:
            factor = load_per_token(step, row, token, head, length, step_b, step_strides, CHUNK)
            if v.dtype.element_ty == tl.bfloat16:
                result += dot_computed(weights * factor[None, :], values, PRECISION)
            else:
                result += dot_computed(weights, values.to(tl.float32) * factor[:, None], PRECISION)
        else:
            result += dot_computed(weights, values, PRECISION)
        result *= scale
        if skip is not None:
            factor_v = tl.load(skip + head * V + channels_v, channels_v < V, 0.0)
            result += factor_v[None, :] * values.to(tl.float32)
        store_tile(out, result, row, token, head, length, out_b, out_strides, first_v, V, CHUNK, BLOCK_V)


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
    round_out: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, g, step = countable(q, k, v, g, step)
    chunks = chunks_of(cu_seqlens, v)
    heads, K, V = v.shape[2], k.shape[3], v.shape[3]
    out = v.new_empty(v.shape, dtype=v.dtype if round_out else torch.float32)
    sizes = (chunks.documents if output_final_state else 0, heads, *((V, K) if value_major else (K, V)))
    final_state = v.new_empty(sizes, dtype=torch.float32)
    kept = v.new_empty(chunk_states_shape(k, v), dtype=torch.float32)
    initial = key_major(initial_state, value_major)
    if v.numel() > 0 or output_final_state:
        ends = key_major(final_state, value_major) if output_final_state else None
        carry_states(k, v, g, step, 1.0, chunks, initial, ends, kept, reverse=False)
    # fp32 products take more registers than sm_80 has for blocks of 32.
    block_v = block_of(V, v.dtype) if v.dtype == torch.bfloat16 else 16
    launch(
        _outputs,
        (chunks.bound, heads, triton.cdiv(V, block_v)),
        q=q,
        k=k,
        v=v,
        g=g,
        step=step,
        skip=skip,
        kept=kept,
        initial=initial,
        out=out,
        scale=float(scale),
        slots=kept.shape[1],
        V=V,
        WIDE_V=kept.shape[4],
        BLOCK_K=half_block_of(K, v.dtype),
        BLOCK_V=block_v,
        **taken(_outputs, shared_arguments(k, v, chunks)),
        **token_strides(q=q, k=k, v=v, out=out, g=g, step=step),
        **state_strides(initial=initial),
    )
    return out, final_state, kept.flatten()


def key_major(state: Tensor | None, value_major: bool) -> Tensor | None:
    """``(documents, H, K, V)`` of states that are ``(documents, H, V, K)`` if ``value_major``."""
    return state.mT if state is not None and value_major else state
