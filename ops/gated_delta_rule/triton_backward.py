"""The gated delta rule's backward on Triton; the formulas are in ``csrc/gated_delta_rule_bwd.h``.

The forward's errors and what outputs want of corrections, of all chunks at once; then the gradients of corrections and
states, from the last chunk of a document to its first; then all chunks' gradients at once. Heads of a group share
queries and keys: each writes gradients of its own, and torch adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.chunks import chunk_states_shape
from packc.ops.common.triton_chunks import (
    QUARTER,
    chunk_of,
    chunks_of,
    countable,
    load_between,
    load_per_token,
    load_tile,
    shared_arguments,
    state_strides,
    store_per_token,
    token_strides,
)
from packc.ops.common.triton_products import (
    dot_by_computed,
    dot_computed,
    dot_fp32,
    from_start,
    log_decays,
    to_end,
    whole,
)
from packc.ops.gated_delta_rule.reference import Gradients
from packc.ops.gated_delta_rule.triton_errors import recompute_errors
from packc.ops.gated_delta_rule.triton_gates import (
    channels_from_start,
    channels_to_end,
    channels_whole,
    gate_of,
    load_dense,
    pair_tile,
    pair_tile_transposed,
    store_dense,
)
from packc.ops.gated_delta_rule.triton_pair_gradients import grad_pairs, pull_channels
from packc.ops.gated_delta_rule.triton_pairs import pairs_of
from packc.ops.gated_delta_rule.triton_resolvents import resolve
from packc.ops.gated_delta_rule.triton_solutions import solve, solve_transposed
from packc.ops.gated_delta_rule.triton_state_gradients import correct_gradients
from packc.ops.linear_attention.triton_states import BEFORE_HOPPER, block_of
from packc.ops.tritonsrc.launch import autotuned, launch


@autotuned(BEFORE_HOPPER, key=["K", "V"])
@triton.jit(do_not_specialize=["rows", "tokens", "slots", "q_b", "k_b", "g_b", "beta_b", "dout_b", "itself_b"])
def _grad_tokens(
    q,
    k,
    g,
    sums,
    beta,
    dout,
    errors,
    wanted,  # l
    dqueries,
    dreaders,
    pulled,  # of them, for gates per channel
    itself,
    table,
    kept,
    dkept,
    initial,
    dfinal,
    dq,  # (rows, tokens, heads, K)
    dk,
    dg,  # the same; or (blocks of K, rows, tokens, heads)
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
    k_b,
    k_strides,
    g_b,
    g_strides,
    beta_b,
    beta_strides,
    dout_b,
    dout_strides,
    itself_b,
    itself_strides,
    initial_strides,
    dfinal_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, last = chunk_of(table, PACKED)
    if length > 0:
        head, first_k = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_K
        group = head // (heads // groups)
        slot = row * slots + token // CHUNK - 1
        entering = slot, document, first, head, heads, initial_strides
        leaving = slot + 1, document, last, head, heads, dfinal_strides
        t = tl.arange(0, CHUNK)
        # From the states: of queries, of keys that read, and of keys that are read.
        query = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        reader = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        key = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        through = tl.zeros([BLOCK_K], tl.float32)
        for first_v in range(0, V, BLOCK_V):
            state = load_between(kept, initial, entering, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
            gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
            query += dot_by_computed(gradients, tl.trans(state), PRECISION)
            owed = load_dense(wanted, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
            reader += dot_fp32(owed, tl.trans(state), PRECISION)
            dstate = load_between(dkept, dfinal, leaving, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
            through += tl.sum(state * dstate, 1)
            error = load_dense(errors, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
            key += dot_fp32(error, tl.trans(dstate), PRECISION)
        factor = load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)[:, None]
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            enters, leaves = from_start(coarse, fine)[:, None], to_end(coarse, fine, CHUNK)[:, None]
            through *= whole(coarse, fine, CHUNK)
        else:
            enters = channels_from_start(
                sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K
            )
            leaves = channels_to_end(sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            through *= channels_whole(sums, row, token, head, rows, tokens, heads, length, first_k, K, BLOCK_K)
        query *= scale * enters
        reader *= -factor * enters
        key *= factor * leaves

        near = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        if g is not None:
            for part in range(0, CHUNK, QUARTER):
                rest = length - part
                queries = load_tile(q, row, token + part, group, rest, q_b, q_strides, first_k, K, QUARTER, BLOCK_K)
                keys = load_tile(k, row, token + part, group, rest, k_b, k_strides, first_k, K, QUARTER, BLOCK_K)
                weights = tl.load(pair_tile(dqueries, tl.program_id(0), head, heads, part, CHUNK, QUARTER))
                query += dot_computed(weights, keys, PRECISION)
                weights = tl.load(pair_tile_transposed(dqueries, tl.program_id(0), head, heads, part, CHUNK, QUARTER))
                near += dot_computed(weights, queries, PRECISION)
                weights = tl.load(pair_tile(dreaders, tl.program_id(0), head, heads, part, CHUNK, QUARTER))
                reader += dot_computed(weights, keys, PRECISION)
                weights = tl.load(pair_tile_transposed(dreaders, tl.program_id(0), head, heads, part, CHUNK, QUARTER))
                near += dot_computed(weights, keys, PRECISION)
        else:
            each = rows.to(tl.int64) * tokens * heads * K
            query += load_dense(pulled, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            near += load_dense(pulled + each, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            reader += load_dense(pulled + 2 * each, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            near += load_dense(pulled + 3 * each, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
        queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
        keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
        queries, keys = queries.to(tl.float32), keys.to(tl.float32)
        # A token owes its own decay nothing. What decays later is summed from the right, what came before from the
        # left, not a whole less a part: strong decays make the parts as small as they like.
        later, before = queries * query + keys * (reader - near), keys * key
        if g is not None:
            before = tl.where(t[:, None] > t[None, :], tl.sum(before, 1)[None, :], 0.0)
            owed_g = tl.cumsum(tl.sum(later, 1), 0, reverse=True) + tl.sum(before, 1) + tl.sum(through, 0)
            dg += tl.program_id(2) * rows.to(tl.int64) * tokens * heads
            store_per_token(dg, owed_g, row, token, head, length, itself_b, itself_strides, CHUNK)
        else:
            ones = tl.where(t[:, None] > t[None, :], 1.0, 0.0)
            owed_g = tl.cumsum(later, 0, reverse=True) + dot_fp32(ones, before, PRECISION)
            owed_g += through[None, :]
            store_dense(dg, owed_g, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
        of_itself = load_per_token(itself, row, token, head, length, itself_b, itself_strides, CHUNK)[:, None]
        query += of_itself * keys
        store_dense(dq, query, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
        key += reader + near + of_itself * queries
        store_dense(dk, key, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)


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
    """dout, q, k and v in one dtype, the others in fp32; gradients in fp32 where heads are added up, else in theirs."""
    dout, q, k, v, g, beta = countable(dout, q, k, v, g, beta)
    chunks = chunks_of(cu_seqlens, v)
    rows, tokens, heads, V = v.shape
    groups, K = k.shape[2:]
    kept = chunk_states.view(chunk_states_shape(k, v))
    dkept = torch.empty_like(kept)
    dstates = kept.new_zeros((chunks.documents, heads, K, V))
    if dfinal_state is not None:
        dstates.copy_(dfinal_state)
    gate, shared = gate_of(g, chunks), shared_arguments(k, v, chunks)
    resolvents = resolve(pairs_of(k, k, gate, shared, with_itself=False), beta, shared)
    pairs = pairs_of(q, k, gate, shared, with_itself=True)
    readers, errors = solve(k, gate, beta, resolvents, shared), solve(v, None, beta, resolvents, shared)
    du = recompute_errors(dout, readers, errors, pairs, initial_state, kept, scale, shared)
    correct_gradients(q, k, gate, beta, dout, readers, chunks, dstates, du, dkept, scale, shared)
    dv = solve_transposed(du, v.dtype, beta, resolvents, shared)
    of_pairs = grad_pairs(gate, beta, dout, errors, du, scale, shared)

    narrow = 32 if v.dtype == torch.bfloat16 and not gate.per_channel else 16
    block_k, block_v = min(narrow, block_of(K, v.dtype)), 16
    own_dtype = q.dtype if groups == heads else torch.float32
    dq, dk = (v.new_empty((rows, tokens, heads, K), dtype=own_dtype) for _ in range(2))
    blocks_k = triton.cdiv(K, block_k)
    dg = beta.new_empty(g.shape if gate.per_channel else (blocks_k, *g.shape))
    launch(
        _grad_tokens,
        (chunks.bound, heads, blocks_k),
        q=q,
        k=k,
        beta=beta,
        dout=dout,
        errors=errors,
        wanted=du,
        dqueries=of_pairs.queries,
        dreaders=of_pairs.readers,
        pulled=pull_channels(q, k, gate, of_pairs, shared),
        itself=of_pairs.with_itself,
        kept=kept,
        dkept=dkept,
        initial=initial_state,
        dfinal=dfinal_state,
        dq=dq,
        dk=dk,
        dg=dg,
        scale=float(scale),
        slots=kept.shape[1],
        V=V,
        WIDE_V=kept.shape[4],
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        **gate.arguments(),
        **shared,
        **token_strides(q=q, k=k, dout=dout, beta=beta, itself=of_pairs.with_itself),
        **state_strides(initial=initial_state, dfinal=dfinal_state),
    )
    return Gradients(
        q=_of_groups(dq, groups),
        k=_of_groups(dk, groups),
        v=dv,
        g=dg if gate.per_channel else dg.sum(0),
        beta=of_pairs.beta,
        initial_state=None if initial_state is None else dstates,
    )


def _of_groups(x: Tensor, groups: int) -> Tensor:
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
