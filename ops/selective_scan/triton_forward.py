"""The scan's forward on Triton: programs walk a segment of a row for a block of channels, tile by tile.

States live in memory between tiles, one vector a state: a loop over states then needs no more registers than one of
them, and N may be anything. What lies at the start of a chunk is kept for the backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops import documents
from packc.ops.selective_scan.reference import CHUNK
from packc.ops.selective_scan.triton_segments import pass_states
from packc.ops.selective_scan.triton_tokens import clear_states, place, step_sizes
from packc.ops.tritonsrc.activations import silu
from packc.ops.tritonsrc.documents import document_of_token
from packc.ops.tritonsrc.launch import autotuned, launch
from packc.ops.tritonsrc.segments import segment_tokens
from packc.ops.tritonsrc.tokens import (
    among,
    at_token,
    channels_of,
    countable,
    documents_of,
    enter,
    load_channels,
    load_tokens,
    store_own,
    store_token,
    strides,
    times,
    wide,
    zeros,
)

BLOCK_D = 128  # channels of a program: a thread has four, which share loads of B and C
WARPS = 16  # that a processor has registers for
TOKENS = 16  # rows of B and C are padded to a multiple of it, so that no tile reads behind their end


@autotuned(
    [
        triton.Config({"BLOCK_T": 4}, num_warps=1),
        triton.Config({"BLOCK_T": 8}, num_warps=2),
    ],
    key=["channels", "states", "PACKED", "OUTPUT"],
)
@triton.jit(
    do_not_specialize=["L", "padded", "segment", "segments", "chunks", "u_b", "delta_b", "z_b"],
    do_not_specialize_on_alignment=["u_d", "delta_d", "z_d"],  # channels lie a length apart, if they are not neighbours
)
def walk(
    u,
    delta,
    A,  # (N, D), in base 2
    B,  # (rows, G, N, padded), as C
    C,
    D,
    z,
    delta_bias,
    document,
    initial_state,  # (documents, D, N), as final_state
    out,  # (rows, L, D)
    final_state,
    chunk_states,  # (rows, chunks, N, D)
    carry,  # (rows, segments, N, D): states between tiles, in the end behind each segment
    total,  # (rows, segments, D)
    L,
    padded,
    channels,
    states,
    groups,
    segment,
    segments,
    chunks,
    u_b,
    u_t,
    u_d,
    delta_b,
    delta_t,
    delta_d,
    z_b,
    z_t,
    z_d,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    OUTPUT: tl.constexpr,  # or only, in carry, the state that leaves each segment
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, _, group, first, end = place(channels, groups, segments, BLOCK_D)
    d = channels_of(first, WIDE, BLOCK_D)
    in_d = d < end
    states_of = states * channels
    begin = at * segment
    stop = tl.minimum(begin + segment, L)
    carry += (row * segments + at) * states_of
    B += (row * groups + group) * states * padded
    bias = load_channels(delta_bias, d, in_d, BLOCK_D)
    if OUTPUT:
        C += (row * groups + group) * states * padded
        chunk_states += row * chunks * states_of
        skip = load_channels(D, d, in_d, BLOCK_D)
    else:
        clear_states(carry, d, in_d, channels, states, BLOCK_D)
    time = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.cdiv(stop - begin, BLOCK_T)):
        token = begin + i * BLOCK_T
        raw = load_tokens(at_token(delta, row, token, d, delta_b, delta_t, delta_d), delta_t, token, d, end, L, BLOCK_T)
        dts = step_sizes(raw, bias, token, L, SOFTPLUS, BLOCK_T)
        u_at = at_token(u, row, token, d, u_b, u_t, u_d)
        xs = times(dts, load_tokens(u_at, u_t, token, d, end, L, BLOCK_T), BLOCK_T)
        of = documents_of(document, token, L, PACKED, BLOCK_T)
        entering, leaving = carry, carry
        if OUTPUT:
            if token % CHUNK == 0:
                entering = chunk_states + (token // CHUNK).to(tl.int64) * states_of
            if ((token + BLOCK_T) % CHUNK == 0) & (token + BLOCK_T < stop):
                leaving = chunk_states + ((token + BLOCK_T) // CHUNK).to(tl.int64) * states_of
        else:
            for r in tl.static_range(BLOCK_T):
                time += dts[r]
        ys = zeros(BLOCK_T, BLOCK_D)
        for n in range(states):
            h = tl.load(entering + n * channels + d, in_d, 0.0)
            rate = tl.load(A + n * channels + d, in_d, 0.0)
            at_n = tl.cast(n, tl.int64) * padded + token
            new = ()
            for r in tl.static_range(BLOCK_T):
                h = enter(h, of, r, initial_state, d, end, n, channels, states, PACKED)
                h = tl.exp2(dts[r] * rate) * h + xs[r] * tl.load(B + at_n + r)
                if OUTPUT:
                    new = new + (ys[r] + h * tl.load(C + at_n + r),)
                    if PACKED and final_state is not None:
                        if of[r + 1] != of[r + 2]:
                            store_own(final_state, h, of[r + 1], d, end, n, channels, states)
            if OUTPUT:
                ys = new
            tl.store(leaving + n * channels + d, h, in_d)
        # The next tile reads what this one left.
        tl.debug_barrier()
        if OUTPUT:
            z_at = u_at
            if z is not None:
                z_at = at_token(z, row, token, d, z_b, z_t, z_d)
            out_at = at_token(out, row, token, d, L, channels, 1)
            for r in tl.static_range(BLOCK_T):
                inside = among(d, end, token + r < L)
                y = ys[r] + skip * tl.load(u_at + r * u_t, inside, 0.0).to(tl.float32)
                if z is not None:
                    y *= silu(tl.load(z_at + r * z_t, inside, 0.0).to(tl.float32))
                store_token(out_at + r * channels, y, d, end, token + r < L)
    if not OUTPUT:
        tl.store(total + (row * segments + at) * channels + d, time, in_d)


class Problem(NamedTuple):
    """What forward and backward prepare alike."""

    rows: int
    tokens: int
    channels: int
    states: int
    groups: int
    blocks: int  # of channels, over all groups
    chunks: int
    segment: int  # tokens
    segments: int
    A: Tensor  # (N, D), times log2(e)
    B: Tensor  # (rows, G, N, padded L), fp32: tokens lie side by side, as a tile reads them
    C: Tensor
    document: Tensor | None
    sizes: dict[str, int]  # under the kernels' names


def prepare(u: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, block_d: int, warps: int) -> Problem:
    rows, tokens, channels = u.shape
    states = A.shape[1]
    groups = B.shape[2] if B.ndim == 4 else 1
    blocks = groups * triton.cdiv(channels // max(groups, 1), block_d)
    segment = segment_tokens(rows, tokens, blocks, CHUNK, u.device, warps)
    chunks = triton.cdiv(tokens, CHUNK)
    segments = triton.cdiv(tokens, segment)
    return Problem(
        rows,
        tokens,
        channels,
        states,
        groups,
        blocks,
        chunks,
        segment,
        segments,
        A=torch.mul(A.float().t(), math.log2(math.e), out=A.new_empty(A.shape[::-1], dtype=torch.float32)),
        B=_tokens_last(B),
        C=_tokens_last(C),
        document=None if cu_seqlens is None else document_of_token(cu_seqlens, tokens),
        sizes={
            "L": tokens,
            "padded": padded_tokens(tokens),
            "channels": channels,
            "states": states,
            "groups": groups,
            "segment": segment,
            "segments": segments,
            "chunks": chunks,
        },
    )


def _tokens_last(x: Tensor) -> Tensor:
    grouped, tokens = x if x.ndim == 4 else x.unsqueeze(2), x.shape[1]
    rows, _, groups, states = grouped.shape
    laid = x.new_empty((rows, groups, states, padded_tokens(tokens)), dtype=torch.float32)
    if laid.shape[3] > tokens:
        laid[..., tokens:].zero_()
    laid[..., :tokens].copy_(grouped.permute(0, 2, 3, 1))  # one copy: F.pad would be another, of zeros
    return laid


def padded_tokens(tokens: int) -> int:
    return triton.cdiv(tokens, TOKENS) * TOKENS


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    u, delta, z = countable(u, delta, z)
    p = prepare(u, A, B, C, cu_seqlens, BLOCK_D, WARPS)
    packed = cu_seqlens is not None
    D, delta_bias, initial_state = (None if x is None else x.contiguous() for x in (D, delta_bias, initial_state))
    out = u.new_empty(u.shape)
    chunk_states = u.new_empty((p.rows, p.chunks, p.states, p.channels), dtype=torch.float32)
    final_state = states_of_empty_documents(u, A, cu_seqlens, initial_state) if output_final_state else None
    if p.tokens > 0:
        enter_rows(chunk_states[:, 0], None if packed else initial_state)
        entering = chunk_states[:, :: p.segment // CHUNK]
        options = {
            "SOFTPLUS": delta_softplus,
            "PACKED": packed,
            "WIDE": wide(u, delta, z),
            "CHUNK": CHUNK,
            "BLOCK_D": BLOCK_D,
            "final_state": final_state,
            "initial_state": initial_state,
            "delta_bias": delta_bias,
            "document": p.document,
        }
        operands: dict[str, Any] = {"u": u, "delta": delta, "A": p.A, "B": p.B, **strides("td", u=u, delta=delta, z=z)}
        operands |= p.sizes | options
        grid = (p.rows * p.segments * p.blocks,)
        carry = u.new_empty((p.rows, p.segments, p.states, p.channels), dtype=torch.float32)
        if p.segments > 1:
            total = carry.new_empty((p.rows, p.segments, p.channels))
            nothing = dict.fromkeys(("C", "D", "z", "out", "chunk_states"))
            launch(walk, grid, **{**operands, **nothing, "final_state": None}, carry=carry, total=total, OUTPUT=False)
            pass_states(carry, total, p.A, p.document, entering, p.tokens, p.segment, reverse=False)
        results = {"out": out, "chunk_states": chunk_states, "carry": carry, "total": None}
        launch(walk, grid, **operands, C=p.C, D=D, z=z, **results, OUTPUT=True)
        if final_state is not None and not packed:
            final_state = carry[:, -1].transpose(1, 2).contiguous()
    if final_state is None:
        final_state = carry_like_states(u, A)
    return out, final_state, chunk_states.flatten()


def carry_like_states(u: Tensor, A: Tensor) -> Tensor:
    """No states at all."""
    return u.new_empty((0, *A.shape), dtype=torch.float32)


def states_of_empty_documents(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, state: Tensor | None) -> Tensor:
    """``(documents, D, N)``, fp32, as if all documents were empty: what enters them leaves them."""
    if state is not None:
        return state.float().clone(memory_format=torch.contiguous_format)
    return u.new_zeros((documents.count(cu_seqlens, u), *A.shape), dtype=torch.float32)


def enter_rows(first: Tensor, initial_state: Tensor | None) -> None:
    """Fills ``(rows, N, D)`` with ``(rows, D, N)`` or zeros."""
    if initial_state is None:
        first.zero_()
    else:
        first.copy_(initial_state.transpose(1, 2))
