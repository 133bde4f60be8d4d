"""Products of a chunk's tokens on Triton, each with what is left of the earlier token in the later one.

A gate per head weighs products of the group's queries and keys; a decay per channel stands inside their sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import chunk_of, load_per_token, load_tile, token_strides
from packc.ops.common.triton_products import between, dot, dot_fp32, log_decays, select
from packc.ops.gated_delta_rule.triton_channels import LEVELS, decay_to_meeting, meets
from packc.ops.gated_delta_rule.triton_gates import Gate, load_sums, pair_tile
from packc.ops.linear_attention.triton_states import BEFORE_HOPPER, CONFIGS, block_of
from packc.ops.tritonsrc.launch import autotuned, launch, taken


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["K"])
@triton.jit(do_not_specialize=["strict", "x_b", "k_b", "g_b"])
def _pairs_of_heads(
    x,
    k,
    g,
    table,
    pairs,
    strict,
    heads,
    groups,
    K,
    x_b,
    x_strides,
    k_b,
    k_strides,
    g_b,
    g_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head = tl.program_id(1).to(tl.int64)
        group = head // (heads // groups)
        products = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first in range(0, K, BLOCK_K):
            later = load_tile(x, row, token, group, length, x_b, x_strides, first, K, CHUNK, BLOCK_K)
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first, K, CHUNK, BLOCK_K)
            products += dot(later, tl.trans(keys), PRECISION)
        coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
        t = tl.arange(0, CHUNK)
        products = tl.where(t[:, None] >= t[None, :] + strict, select(between(coarse, fine, CHUNK), products), 0.0)
        tl.store(pair_tile(pairs, tl.program_id(0), head, heads, 0, CHUNK, CHUNK), products)


@autotuned(CONFIGS, key=["K"], before_hopper=BEFORE_HOPPER)
@triton.jit(do_not_specialize=["rows", "tokens", "strict", "x_b", "k_b"])
def _pairs_of_channels(
    x,
    k,
    sums,
    table,
    pairs,
    strict,
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
        head = tl.program_id(1).to(tl.int64)
        group = head // (heads // groups)
        t = tl.arange(0, CHUNK)
        own = tl.zeros([CHUNK], tl.float32)
        products = tl.zeros([CHUNK, CHUNK], tl.float32)
        for first in range(0, K, BLOCK_K):
            later = load_tile(x, row, token, group, length, x_b, x_strides, first, K, CHUNK, BLOCK_K)
            later = later.to(tl.float32)
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first, K, CHUNK, BLOCK_K)
            keys = keys.to(tl.float32)
            own += tl.sum(later * keys, 1)
            coarse, fine = load_sums(sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK_K)
            for level in range(LEVELS):
                half = 1 << level
                left = decay_to_meeting(
                    sums, coarse, fine, half, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK_K
                )
                met = dot_fp32(later * left, tl.trans(keys * left), PRECISION)
                products += tl.where(meets(half, CHUNK), met, 0.0)
        products = tl.where(t[:, None] == t[None, :] + strict * CHUNK, own[:, None], products)
        tl.store(pair_tile(pairs, tl.program_id(0), head, heads, 0, CHUNK, CHUNK), products)


def pairs_of(x: Tensor, k: Tensor, gate: Gate, shared: dict[str, Any], with_itself: bool) -> Tensor:
    """fp32 ``(chunks, H, CHUNK, CHUNK)``: of tokens of x ``(B, L, G, K)`` with k of earlier ones, 0 for later ones."""
    chunks, heads = shared["table"].shape[0], shared["heads"]
    pairs = k.new_empty((chunks, heads, shared["CHUNK"], shared["CHUNK"]), dtype=torch.float32)
    if gate.per_channel:
        # fp32 inputs take more registers than there are for blocks of 32.
        kernel, block_k = _pairs_of_channels, 16 if k.dtype == torch.float32 else block_of(k.shape[3], torch.float32)
    else:
        kernel, block_k = _pairs_of_heads, block_of(k.shape[3], k.dtype)
    launch(
        kernel,
        (chunks, heads),
        x=x,
        k=k,
        pairs=pairs,
        strict=int(not with_itself),
        BLOCK_K=block_k,
        **taken(kernel, gate.arguments() | shared),
        **token_strides(x=x, k=k),
    )
    return pairs
