"""The gradients of scores on Triton, and what pairs of tokens in a chunk owe to decays."""

from __future__ import annotations

import triton
import triton.language as tl

from packc.ops.common.triton_chunks import chunk_of, load_per_token, load_tile, store_per_token
from packc.ops.common.triton_products import (
    between,
    dot,
    log_decays,
    select,
)
from packc.ops.linear_attention.triton_states import CONFIGS
from packc.ops.tritonsrc.launch import autotuned


@autotuned(CONFIGS, key=["K", "V"], before_hopper=CONFIGS[1:])
@triton.jit(do_not_specialize=["q_b", "k_b", "v_b", "g_b", "step_b", "dout_b", "dg_b"])
def grad_pairs(
    q,
    k,
    v,
    g,
    step,
    dout,
    table,
    dscores,  # (chunks, heads, CHUNK, CHUNK)
    dg,  # (rows, L, heads): what is owed to decays by pairs of tokens in a chunk
    scale,
    heads,
    groups,
    K,
    V,
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
    dg_b,
    dg_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of q k^T, with all that stands between it and do v^T: of it dq and dk are products with k and q."""
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        t = tl.arange(0, CHUNK)
        result = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first_v in range(0, V, BLOCK_V):
            values = load_tile(v, row, token, head, length, v_b, v_strides, first_v, V, CHUNK, BLOCK_V)
            gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
            result += dot(gradients, tl.trans(values), PRECISION)
        result *= scale
        if step is not None:
            result *= load_per_token(step, row, token, head, length, step_b, step_strides, CHUNK)[None, :]
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            result = select(between(coarse, fine, CHUNK), result)
            group = head // (heads // groups)
            scores = tl.zeros([CHUNK, CHUNK], tl.float32)
            for first_k in range(0, K, BLOCK_K):
                queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
                keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
                scores += dot(queries, tl.trans(keys), PRECISION)
            # A token owes its own decay nothing: left to cancel, that would leave its rounding errors.
            pairs = tl.where(t[:, None] > t[None, :], scores * result, 0.0)
            owed = tl.cumsum(tl.sum(pairs, 1) - tl.sum(pairs, 0), 0, reverse=True)
            store_per_token(dg, owed, row, token, head, length, dg_b, dg_strides, CHUNK)
        else:
            result = tl.where(t[:, None] >= t[None, :], result, 0.0)
        dscores += (tl.program_id(0).to(tl.int64) * heads + head) * CHUNK * CHUNK
        tl.store(dscores + (t[:, None] * CHUNK + t[None, :]), result)
