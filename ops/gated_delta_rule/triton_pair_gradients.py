"""The gradients of products of a chunk's tokens, and for gates per channel what they are to queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import (
    chunk_of,
    load_per_token,
    load_tile,
    store_per_token,
    token_strides,
)
from packc.ops.common.triton_products import (
    between,
    dot_by_computed,
    dot_fp32,
    fp32_products,
    log_decays,
    select,
)
from packc.ops.gated_delta_rule.triton_channels import LEVELS, decay_to_meeting, meets
from packc.ops.gated_delta_rule.triton_gates import (
    Gate,
    load_dense,
    load_sums,
    pair_tile,
    pair_tile_transposed,
    store_dense,
)
from packc.ops.tritonsrc.launch import autotuned, launch, taken


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["V"])
@triton.jit(do_not_specialize=["tokens", "g_b", "beta_b", "dout_b", "dbeta_b"])
def _grad_pairs(
    g,
    beta,
    dout,
    errors,
    wanted,  # l
    table,
    dqueries,  # (chunks, heads, CHUNK, CHUNK): of q_i . k_j, j < i
    dreaders,  # of k_i . k_j
    dwith_itself,  # (rows, tokens, heads): of q_i . k_i
    dbeta,  # the same
    scale,
    tokens,
    heads,
    V,
    g_b,
    g_strides,
    beta_b,
    beta_strides,
    dout_b,
    dout_strides,
    dbeta_b,
    dbeta_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        of_query = tl.zeros([CHUNK, CHUNK], tl.float32)
        of_reader = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first_v in range(0, V, BLOCK_V):
            gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
            error = tl.trans(load_dense(errors, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V))
            owed = load_dense(wanted, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
            of_query += dot_by_computed(gradients, error, PRECISION)
            of_reader += dot_fp32(owed, error, PRECISION)
        t = tl.arange(0, CHUNK)
        own = t[:, None] == t[None, :]
        before = t[:, None] > t[None, :]
        factor = load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)
        of_itself = tl.sum(tl.where(own, of_query, 0.0), 1) * (scale * factor)
        store_per_token(dwith_itself, of_itself, row, token, head, length, dbeta_b, dbeta_strides, CHUNK)
        of_beta = tl.sum(tl.where(own, of_reader, 0.0), 1)
        store_per_token(dbeta, of_beta, row, token, head, length, dbeta_b, dbeta_strides, CHUNK)
        of_query *= scale * factor[None, :]
        of_reader *= -factor[:, None] * factor[None, :]
        if g is not None:
            left = between(*log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK)), CHUNK)
            of_query, of_reader = select(left, of_query), select(left, of_reader)
        tl.store(pair_tile(dqueries, tl.program_id(0), head, heads, 0, CHUNK, CHUNK), tl.where(before, of_query, 0.0))
        tl.store(pair_tile(dreaders, tl.program_id(0), head, heads, 0, CHUNK, CHUNK), tl.where(before, of_reader, 0.0))


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["K"])
@triton.jit(do_not_specialize=["rows", "tokens", "x_b", "k_b"])
def _pull_channels(
    x,
    k,
    sums,
    dpairs,
    table,
    dx,  # (rows, tokens, heads, K)
    dk,  # the same
    rows,
    tokens,
    heads,
    groups,
    K,
    x_b,
    x_strides,
    k_b,
    k_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_K
        group = head // (heads // groups)
        coarse, fine = load_sums(sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK_K)
        of_later = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        of_key = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        for level in range(LEVELS):
            half = 1 << level
            left = decay_to_meeting(
                sums, coarse, fine, half, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK_K
            )
            weights = tl.load(
                pair_tile(dpairs, tl.program_id(0), head, heads, 0, CHUNK, CHUNK), meets(half, CHUNK), 0.0
            )
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first, K, CHUNK, BLOCK_K)
            of_later += left * dot_fp32(weights, keys.to(tl.float32) * left, PRECISION)
            later = load_tile(x, row, token, group, length, x_b, x_strides, first, K, CHUNK, BLOCK_K)
            weights = tl.load(  # again: both ways at once, they take more registers than there are
                pair_tile_transposed(dpairs, tl.program_id(0), head, heads, 0, CHUNK, CHUNK),
                tl.trans(meets(half, CHUNK)),
                0.0,
            )
            of_key += left * dot_fp32(weights, later.to(tl.float32) * left, PRECISION)
        store_dense(dx, of_later, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK_K)
        store_dense(dk, of_key, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK_K)


class PairGradients(NamedTuple):
    queries: Tensor  # (chunks, H, CHUNK, CHUNK): of q_i . k_j, j < i
    readers: Tensor  # the same of k_i . k_j
    with_itself: Tensor  # (B, L, H): of q_i . k_i
    beta: Tensor  # (B, L, H)


def grad_pairs(
    gate: Gate,
    beta: Tensor,
    dout: Tensor,
    errors: Tensor,
    wanted: Tensor,
    scale: float,
    shared: dict[str, Any],
) -> PairGradients:
    """Of products without the decay of a gate per head, which is in them already."""
    chunks, heads, V = shared["table"].shape[0], shared["heads"], dout.shape[3]
    shapes = 2 * [(chunks, heads, shared["CHUNK"], shared["CHUNK"])] + 2 * [beta.shape]
    of_pairs = PairGradients(*(errors.new_empty(shape) for shape in shapes))
    launch(
        _grad_pairs,
        (chunks, heads),
        beta=beta,
        dout=dout,
        errors=errors,
        wanted=wanted,
        dqueries=of_pairs.queries,
        dreaders=of_pairs.readers,
        dwith_itself=of_pairs.with_itself,
        dbeta=of_pairs.beta,
        scale=float(scale),
        V=V,
        BLOCK_V=16,
        g=gate.g,
        **taken(_grad_pairs, shared),
        **token_strides(dout=dout, g=gate.g, beta=beta, dbeta=of_pairs.beta),
    )
    return of_pairs


def pull_channels(q: Tensor, k: Tensor, gate: Gate, of_pairs: PairGradients, shared: dict[str, Any]) -> Tensor | None:
    """fp32 ``(4, B, L, H, K)``: of queries and their keys, of keys that read and theirs; None for a gate per head."""
    if gate.sums is None:
        return None
    K = k.shape[3]
    pulled = gate.sums.new_empty((2, 2, *gate.sums.shape[1:]))
    block_k = 16
    for x, dpairs, (dx, dk) in zip((q, k), of_pairs[:2], pulled, strict=True):
        launch(
            _pull_channels,
            (shared["table"].shape[0], shared["heads"], triton.cdiv(K, block_k)),
            x=x,
            k=k,
            sums=gate.sums,
            dpairs=dpairs,
            dx=dx,
            dk=dk,
            BLOCK_K=block_k,
            # What gates are owed is a difference of two of these.
            **shared | {"PRECISION": fp32_products(torch.float32)},
            **token_strides(x=x, k=k),
        )
    return pulled
