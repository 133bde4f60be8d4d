"""dv on Triton, and the gradients of a step size and of the skip connection, which it is at hand for."""

from __future__ import annotations

import triton
import triton.language as tl

from packc.ops.common.triton_chunks import (
    chunk_of,
    load_between,
    load_per_token,
    load_tile,
    store_per_token,
    store_tile,
)
from packc.ops.common.triton_products import (
    between_transposed,
    dot,
    dot_by_computed,
    dot_computed,
    log_decays,
    select,
    to_end,
)
from packc.ops.linear_attention.triton_states import CONFIGS
from packc.ops.tritonsrc.launch import autotuned


@autotuned(CONFIGS, key=["K", "V"], before_hopper=CONFIGS[1:])
@triton.jit(do_not_specialize=["slots", "q_b", "k_b", "v_b", "g_b", "step_b", "dout_b", "dv_b", "dstep_b", "per_block"])
def grad_v(
    q,
    k,
    v,
    g,
    step,
    skip,
    dout,
    table,
    dkept,
    dfinal,
    dv,
    dstep,  # (blocks of V, rows, L, heads)
    dskip,  # (chunks, heads, V)
    scale,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    per_block,
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
    dout_b,
    dout_strides,
    dfinal_strides,
    dv_b,
    dv_strides,
    dstep_b,
    dstep_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, _, last = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        group = head // (heads // groups)
        first_v = tl.program_id(2) * BLOCK_V
        channels_v = first_v + tl.arange(0, BLOCK_V)
        slot = row * slots + token // CHUNK
        leaving = slot, document, last, head, heads, dfinal_strides
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)  # of keys with queries: what is summed over is on the right
        result = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for first_k in range(0, K, BLOCK_K):
            queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
            scores += dot(keys, tl.trans(queries), PRECISION)
            dstate = load_between(dkept, dfinal, leaving, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
            result += dot_by_computed(keys, dstate, PRECISION)
        t = tl.arange(0, CHUNK)
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            result *= to_end(coarse, fine, CHUNK)[:, None]
            weights = select(between_transposed(coarse, fine, CHUNK), scores)
        else:
            weights = tl.where(t[None, :] >= t[:, None], scores, 0.0)
        gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
        result += dot_computed(weights * scale, gradients, PRECISION)
        if (step is not None) or (skip is not None):
            values = load_tile(v, row, token, head, length, v_b, v_strides, first_v, V, CHUNK, BLOCK_V)
            values = values.to(tl.float32)
            if step is not None:
                own = dstep + tl.program_id(2) * per_block.to(tl.int64)
                store_per_token(
                    own, tl.sum(result * values, 1), row, token, head, length, dstep_b, dstep_strides, CHUNK
                )
                result *= load_per_token(step, row, token, head, length, step_b, step_strides, CHUNK)[:, None]
            if skip is not None:
                gradients = gradients.to(tl.float32)
                inside = channels_v < V
                result += gradients * tl.load(skip + head * V + channels_v, inside, 0.0)[None, :]
                at = (tl.program_id(0).to(tl.int64) * heads + head) * V + channels_v
                tl.store(dskip + at, tl.sum(gradients * values, 0), inside)
        store_tile(dv, result, row, token, head, length, dv_b, dv_strides, first_v, V, CHUNK, BLOCK_V)
