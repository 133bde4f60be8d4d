"""The gradients of states and of corrections, along every document from its end: the backward's sequential part."""

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
from packc.ops.gated_delta_rule.triton_gates import (
    Gate,
    channels_from_start,
    channels_to_end,
    channels_whole,
    load_dense,
    store_dense,
)
from packc.ops.gated_delta_rule.triton_states import document_of, state_tile
from packc.ops.linear_attention.triton_states import block_of
from packc.ops.tritonsrc.launch import launch, taken

_COLUMNS = 32  # of V, of a program


@triton.jit(do_not_specialize=["rows", "tokens", "slots", "q_b", "k_b", "g_b", "beta_b", "dout_b"])
def _correct_gradients(
    q,
    k,
    g,
    sums,
    beta,
    dout,
    readers,  # (rows, tokens, heads, K)
    starts,
    dkept,  # (rows, slots, heads, K, WIDE_V): of what leaves a chunk, in the slot of what enters the next
    dstates,  # (documents, heads, K, V): of what documents end with; then of what they begin with
    du,  # (rows, tokens, heads, V): but for what the states want; then all
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
    count = tl.cdiv(size, CHUNK)
    for nth in range(count):
        i = count - 1 - nth
        token, length = begin + i * CHUNK, tl.minimum(size - i * CHUNK, CHUNK)
        slot = row * slots + token // CHUNK
        tl.debug_barrier()  # threads read what others wrote
        wanted = tl.zeros([CHUNK, BLOCK_V], tl.float32)
        gradients = load_tile(dout, row, token, head, length, dout_b, dout_strides, first_v, V, CHUNK, BLOCK_V)
        left = 1.0
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            gradients = gradients.to(tl.float32) * (scale * from_start(coarse, fine)[:, None])
            left = whole(coarse, fine, CHUNK)
        for first_k in range(0, K, BLOCK_K):
            inside = inside_of(K - first_k, V - first_v, BLOCK_K, BLOCK_V)
            running = state_tile(dstates, own, first_k, first_v, K, V, BLOCK_K, BLOCK_V)
            dstate = tl.load(running, inside, 0.0)
            at = state_tile(dkept, slot * heads + head, first_k, first_v, K, WIDE_V, BLOCK_K, BLOCK_V)
            tl.store(at, dstate, inside & (nth > 0))
            keys = load_tile(k, row, token, group, length, k_b, k_strides, first_k, K, CHUNK, BLOCK_K)
            if sums is not None:
                keys = keys.to(tl.float32) * channels_to_end(
                    sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K
                )
            wanted += dot_by_computed(keys, dstate, PRECISION)
            queries = load_tile(q, row, token, group, length, q_b, q_strides, first_k, K, CHUNK, BLOCK_K)
            if sums is not None:
                enters = channels_from_start(
                    sums, row, token, head, rows, tokens, heads, length, first_k, K, CHUNK, BLOCK_K
                )
                queries = queries.to(tl.float32) * (scale * enters)
                left_k = channels_whole(sums, row, token, head, rows, tokens, heads, length, first_k, K, BLOCK_K)
                dstate = left_k[:, None] * dstate + dot_computed(tl.trans(queries), gradients, PRECISION)
            else:
                dstate = left * dstate + dot_by_computed(tl.trans(queries), gradients, PRECISION)
            tl.store(running, dstate, inside)
        if g is not None:
            wanted *= to_end(coarse, fine, CHUNK)[:, None]
        wanted += load_dense(du, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
        store_dense(du, wanted, row, token, head, tokens, heads, length, first_v, V, CHUNK, BLOCK_V)
        wanted *= load_per_token(beta, row, token, head, length, beta_b, beta_strides, CHUNK)[:, None]
        tl.debug_barrier()
        for first_k in range(0, K, BLOCK_K):
            keys = load_dense(readers, row, token, head, tokens, heads, length, first_k, K, CHUNK, BLOCK_K)
            inside = inside_of(K - first_k, V - first_v, BLOCK_K, BLOCK_V)
            running = state_tile(dstates, own, first_k, first_v, K, V, BLOCK_K, BLOCK_V)
            dstate = tl.load(running, inside, 0.0) - dot_fp32(tl.trans(keys), wanted, PRECISION)
            tl.store(running, dstate, inside)


def correct_gradients(
    q: Tensor,
    k: Tensor,
    gate: Gate,
    beta: Tensor,
    dout: Tensor,
    readers: Tensor,
    chunks: Chunks,
    dstates: Tensor,
    du: Tensor,
    dkept: Tensor,
    scale: float,
    shared: dict[str, Any],
) -> None:
    """Of fp32 ``dstates (documents, H, K, V)``, from that of what documents end with to that of what they begin with.

    Fills ``dkept`` (``chunk_states_shape``) and completes ``du (B, L, H, V)``.
    """
    V = dout.shape[3]
    launch(
        _correct_gradients,
        (chunks.documents, dout.shape[2], triton.cdiv(V, _COLUMNS)),
        q=q,
        k=k,
        beta=beta,
        dout=dout,
        readers=readers,
        starts=chunks.starts,
        dkept=dkept,
        dstates=dstates,
        du=du,
        scale=float(scale),
        slots=dkept.shape[1],
        V=V,
        WIDE_V=dkept.shape[4],
        BLOCK_K=16 if k.dtype == torch.float32 else block_of(k.shape[3], torch.float32),
        BLOCK_V=_COLUMNS,
        **gate.arguments(),
        **taken(_correct_gradients, shared),
        **token_strides(q=q, k=k, dout=dout, beta=beta),
        # fp32 inputs take more registers: with four, some ptxas keep values on the stack for sm_100.
        num_warps=8 if k.dtype == torch.float32 else 4,
        num_stages=1,
    )
