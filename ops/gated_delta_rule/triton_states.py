"""The states that enter chunks, and the corrections u, along every document on Triton: the forward's sequential part.

A program has all of K and some columns of V, which know nothing of each other. Between chunks the state is in memory,
near enough: registers would not hold it. What works in place, here and elsewhere, is not tuned: it cannot run twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import (
    Chunks,
    inside_of,
    load_per_token,
    load_tile,
    slots_behind,
    token_strides,
)
from packc.ops.common.triton_products import dot_by_computed, dot_fp32, log_decays, to_end, whole
from packc.ops.gated_delta_rule.triton_gates import (
    Gate,
    channels_to_end,
    channels_whole,
    load_dense,
    store_dense,
)
from packc.ops.linear_attention.triton_states import block_of
from packc.ops.tritonsrc.launch import launch, taken

# Registers of a thread, which do for what the kernel holds of bf16 and fp16 where little is hoisted out of its loop:
# ptxas of its own accord takes 96 and spills, or far more than it needs.
_OF_HALF = 128


@triton.jit
def document_of(starts, PACKED: tl.constexpr):
    """Document, row, first token within it, and tokens, of this program's document."""
    document = tl.program_id(0)
    start = tl.load(starts + document)
    size = tl.load(starts + document + 1) - start
    row, begin = (0, start) if PACKED else (document, 0)
    return document.to(tl.int64), tl.cast(row, tl.int64), tl.cast(begin, tl.int32), size


@triton.jit
def state_tile(x, nth, first_k, first_v, K, wide, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Pointers to a block of the ``nth`` of dense states of ``(K, wide)``."""
    x += (nth * K + first_k) * wide + first_v
    return x + (tl.arange(0, BLOCK_K)[:, None] * wide + tl.arange(0, BLOCK_V)[None, :])


@triton.jit(do_not_specialize=["rows", "tokens", "slots", "k_b", "g_b", "beta_b"])
def _correct_states(
    k,
    g,
    sums,
    beta,
    readers,  # (rows, tokens, heads, K)
    starts,
    kept,  # (rows, slots, heads, K, WIDE_V)
    states,  # (documents, heads, K, V): that documents begin with; then that they end with
    u,  # (rows, tokens, heads, V): but for what the states say; then the corrections
    rows,
    tokens,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    k_b,
    k_strides,
    g_b,
    g_strides,
    beta_b,
    beta_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    document, row, begin, size = document_of(starts, PACKED)
    head, first_v = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_V
    group = head // (heads // groups)
    own = document * heads + head
    for i in tl.range(tl.cdiv(size, CHUNK), disable_licm=k.dtype.element_ty != tl.float32):
        token, length = begin + i * CHUNK, tl.minimum(size - i * CHUNK, CHUNK)
        slot = row * slots + token // CHUNK - 1
        tl.debug_barrier()  # other threads wrote the state that enters
        errors = load_dense(u, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
        for first_k in range(0, K, BLOCK_K):
            keys = load_dense(readers, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            inside = inside_of(K - first_k, V - first_v, BLOCK_K, BLOCK_V)
            state = tl.load(state_tile(states, own, first_k, first_v, K, V, BLOCK_K, BLOCK_V), inside, 0.0)
            at = state_tile(kept, slot * heads + head, first_k, first_v, K, WIDE_V, BLOCK_K, BLOCK_V)
            tl.store(at, state, inside_of(K - first_k, WIDE_V - first_v, BLOCK_K, BLOCK_V) & (i > 0))
            errors -= dot_fp32(keys, state, PRECISION)
        errors *= load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)[:, None]
        store_dense(u, errors, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
        left = 1.0
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            errors *= to_end(coarse, fine, CHUNK)[:, None]
            left = whole(coarse, fine, CHUNK)
        tl.debug_barrier()  # and read it above
        for first_k in range(0, K, BLOCK_K):
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
            inside = inside_of(K - first_k, V - first_v, BLOCK_K, BLOCK_V)
            at = state_tile(states, own, first_k, first_v, K, V, BLOCK_K, BLOCK_V)
            state = tl.load(at, inside, 0.0)
            if sums is not None:
                keys = keys.to(tl.float32) * channels_to_end(
                    sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K
                )
                left_k = channels_whole(sums, row, token, head, rows, tokens, heads, length, first_k, K, BLOCK_K)
                state *= left_k[:, None]
            else:
                state *= left
            state += dot_by_computed(tl.trans(keys), errors, PRECISION)
            tl.store(at, state, inside)
    unused, end = slots_behind(starts, document, tl.cdiv(size, CHUNK), slots, PACKED, CHUNK)
    for nth in range(unused, end):
        for first_k in range(0, K, BLOCK_K):
            at = state_tile(kept, (row * slots + nth) * heads + head, first_k, first_v, K, WIDE_V, BLOCK_K, BLOCK_V)
            inside = inside_of(K - first_k, WIDE_V - first_v, BLOCK_K, BLOCK_V)
            tl.store(at, tl.zeros([BLOCK_K, BLOCK_V], tl.float32), inside)


def correct_states(
    k: Tensor,
    gate: Gate,
    beta: Tensor,
    readers: Tensor,
    u: Tensor,
    chunks: Chunks,
    states: Tensor,
    kept: Tensor,
    shared: dict[str, Any],
) -> None:
    """Of fp32 ``states (documents, H, K, V)``, from what documents begin with to what they end with.

    Fills ``kept`` (``chunk_states_shape``) and completes ``u (B, L, H, V)``.
    """
    V = u.shape[3]
    # Fewer of fp32, which all is that a gate per channel has touched.
    block_v = 32 if k.dtype == torch.bfloat16 and V > 16 and not gate.per_channel else 16
    launch(
        _correct_states,
        (chunks.documents, u.shape[2], triton.cdiv(V, block_v)),
        k=k,
        beta=beta,
        readers=readers,
        starts=chunks.starts,
        kept=kept,
        states=states,
        u=u,
        slots=kept.shape[1],
        V=V,
        WIDE_V=kept.shape[4],
        BLOCK_K=block_of(k.shape[3], torch.float32),
        BLOCK_V=block_v,
        **gate.arguments(),
        **taken(_correct_states, shared),
        **token_strides(k=k, beta=beta),
        num_warps=4,
        num_stages=1,
        maxnreg=None if k.dtype == torch.float32 else _OF_HALF,
    )
