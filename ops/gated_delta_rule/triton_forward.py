"""The gated delta rule's forward on Triton; the formulas are in ``csrc/gated_delta_rule.h``.

What needs no state comes first, of all chunks at once; then states and corrections, document by document; then all
chunks' outputs at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.chunks import chunk_states_shape
from packc.ops.common.triton_chunks import (
    HALF,
    chunk_of,
    chunks_of,
    countable,
    load_between,
    load_per_token,
    load_tile,
    shared_arguments,
    state_strides,
    token_strides,
)
from packc.ops.common.triton_products import dot_by_computed, dot_fp32, from_start, log_decays
from packc.ops.gated_delta_rule.triton_gates import (
    channels_from_start,
    gate_of,
    load_dense,
    pair_tile,
    store_dense,
)
from packc.ops.gated_delta_rule.triton_pairs import pairs_of
from packc.ops.gated_delta_rule.triton_resolvents import resolve
from packc.ops.gated_delta_rule.triton_solutions import solve
from packc.ops.gated_delta_rule.triton_states import correct_states
from packc.ops.linear_attention.triton_states import BEFORE_HOPPER, CONFIGS, block_of
from packc.ops.tritonsrc.launch import autotuned, launch


@autotuned(CONFIGS, key=["K", "V"], before_hopper=BEFORE_HOPPER)
@triton.jit(do_not_specialize=["rows", "tokens", "slots", "q_b", "g_b"])
def _outputs(
    q,
    g,
    sums,
    pairs,
    u,
    table,
    kept,
    initial,
    out,  # (rows, tokens, heads, V)
    scale,
    rows,
    tokens,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    q_b,
    q_strides,
    g_b,
    g_strides,
    initial_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first_v = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_V
        group = head // (heads // groups)
        slot = row * slots + token // CHUNK - 1
        entering = slot, document, first, head, heads, initial_strides
        result = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        for first_k in range(0, K, BLOCK_K):
            queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
            if sums is not None:
                queries = queries.to(tl.float32) * channels_from_start(
                    sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K
                )
            state = load_between(kept, initial, entering, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
            result += dot_by_computed(queries, state, PRECISION)
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            result *= from_start(coarse, fine)[:, None]
        for past in range(0, CHUNK, HALF):
            corrections = load_dense(
                u, row, token + past, head, tokens, heads, length - past, first_v, V, HALF, BLOCK_V
            )
            weights = tl.load(pair_tile(pairs, tl.program_id(0), head, heads, past, CHUNK, HALF))
            result += dot_fp32(weights, corrections, PRECISION)
        store_dense(out, result * scale, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)


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
    """q, k and v in one dtype, the others in fp32."""
    q, k, v, g, beta = countable(q, k, v, g, beta)
    chunks = chunks_of(cu_seqlens, v)
    heads, K, V = v.shape[2], k.shape[3], v.shape[3]
    out = v.new_empty(v.shape)
    states = v.new_zeros((chunks.documents, heads, K, V), dtype=torch.float32)
    if initial_state is not None:
        states.copy_(initial_state)
    kept = v.new_empty(chunk_states_shape(k, v), dtype=torch.float32)
    gate, shared = gate_of(g, chunks), shared_arguments(k, v, chunks)
    resolvents = resolve(pairs_of(k, k, gate, shared, with_itself=False), beta, shared)
    readers, u = solve(k, gate, beta, resolvents, shared), solve(v, None, beta, resolvents, shared)
    correct_states(k, gate, beta, readers, u, chunks, states, kept, shared)
    block_v = block_of(V, q.dtype)
    launch(
        _outputs,
        (chunks.bound, heads, triton.cdiv(V, block_v)),
        q=q,
        pairs=pairs_of(q, k, gate, shared, with_itself=True),
        u=u,
        kept=kept,
        initial=initial_state,
        out=out,
        scale=float(scale),
        slots=kept.shape[1],
        V=V,
        WIDE_V=kept.shape[4],
        BLOCK_K=block_of(K, torch.float32),
        BLOCK_V=block_v,
        **gate.arguments(),
        **shared,
        **token_strides(q=q),
        **state_strides(initial=initial_state),
    )
    return out, states if output_final_state else states.new_empty((0, heads, K, V)), kept.flatten()
