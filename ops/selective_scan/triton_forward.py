"""The scan's forward on Triton: programs walk a segment of a row for a block of channels, tile by tile.

States live in memory between tiles, one vector a state: a loop over states then needs no more registers than one of
them, and N may be anything. What lies at the start of a chunk is kept for the backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops import documents
from packc.ops.selective_scan import triton_segments
from packc.ops.selective_scan.reference import CHUNK
from packc.ops.selective_scan.triton_tile import (
    boundaries,
    load_tile,
    pick_token,
    place,
    raw_step_sizes,
    scan,
    step_sizes,
    store_tile,
)
from packc.ops.tritonsrc.activations import silu
from packc.ops.tritonsrc.documents import document_of_token
from packc.ops.tritonsrc.launch import autotuned, launch

BLOCK_D = 64


@autotuned(
    [
        triton.Config({"BLOCK_T": 8}, num_warps=1),
        triton.Config({"BLOCK_T": 8}, num_warps=2),
        triton.Config({"BLOCK_T": 16}, num_warps=2),
    ],
    key=["channels", "states", "PACKED", "OUTPUT"],
)
@triton.jit(
    do_not_specialize=[
        *("L", "segment", "segments", "u_b", "u_t", "u_d", "delta_b", "delta_t", "delta_d", "z_b", "z_t", "z_d"),
        "chunks",
    ]
)
def _walk(
    u,
    delta,
    A,  # (N, D), in base 2
    B,  # (rows, G, N, L), as C
    C,
    D,
    z,
    delta_bias,
    document,
    initial_state,  # (documents, D, N), as final_state
    out,  # (rows, L, D)
    final_state,
    chunk_states,  # (rows, chunks, N, D)
    carry,  # (rows, segments, N, D)
    total,  # (rows, segments, D)
    L,
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
    OUTPUT: tl.constexpr,  # or only the state that leaves each segment, from zero in carry
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, _, group, first, end = place(channels, groups, segments, BLOCK_D)
    d = first + tl.arange(0, BLOCK_D)
    in_d = d < end
    inner = tl.arange(0, BLOCK_T)
    wide_row = row.to(tl.int64)
    states_of = states * channels
    carry += (wide_row * segments + at) * states_of
    begin = at * segment
    stop = tl.minimum(begin + segment, L)
    time = tl.zeros([BLOCK_D], tl.float32)
    B += (wide_row * groups + group) * states * L
    if OUTPUT:
        C += (wide_row * groups + group) * states * L
        chunk_states += wide_row * chunks * states_of
    for i in range(tl.cdiv(stop - begin, BLOCK_T)):
        token = begin + i * BLOCK_T
        in_t = token + inner < L
        mask = in_t[:, None] & in_d[None, :]
        raw = raw_step_sizes(delta, delta_bias, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T)
        dt = step_sizes(raw, mask, SOFTPLUS)
        u_tile = load_tile(u, row, token, d, mask, u_b, u_t, u_d, BLOCK_T)
        x = dt * u_tile
        here, starts, ends, boundary = boundaries(document, token, L, PACKED, BLOCK_T)
        entering, leaving = carry, carry
        if OUTPUT:
            y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if token % CHUNK == 0:
                entering = chunk_states + (token // CHUNK).to(tl.int64) * states_of
            if ((token + BLOCK_T) % CHUNK == 0) & (token + BLOCK_T < stop):
                leaving = chunk_states + ((token + BLOCK_T) // CHUNK).to(tl.int64) * states_of
        else:
            time += tl.sum(dt, 0)
        for n in range(states):
            h = tl.load(entering + n * channels + d, in_d, 0.0)
            rate = tl.load(A + n * channels + d, in_d, 0.0)
            a = tl.exp2(dt * rate[None, :])
            at_n = tl.cast(n, tl.int64) * L + token
            b = x * tl.load(B + at_n + inner, in_t, 0.0)[:, None]
            if initial_state is not None and PACKED:
                if boundary:
                    own = initial_state + (here * channels + d[None, :]) * states + n
                    b += a * tl.load(own, mask & starts, 0.0).to(tl.float32)
            h = scan(a, b, h, starts, boundary, BLOCK_T)
            tl.store(leaving + n * channels + d, pick_token(h, BLOCK_T - 1, BLOCK_T), in_d)
            if OUTPUT:
                y += h * tl.load(C + at_n + inner, in_t, 0.0)[:, None]
                if final_state is not None:
                    if PACKED:
                        if boundary:
                            own = final_state + (here * channels + d[None, :]) * states + n
                            tl.store(own, h, mask & ends)
                    else:
                        if token + BLOCK_T >= L:
                            own = final_state + (wide_row * channels + d) * states + n
                            tl.store(own, pick_token(h, BLOCK_T - 1, BLOCK_T), in_d)
        # The next tile reads what this one left.
        tl.debug_barrier()
        if OUTPUT:
            if D is not None:
                y += u_tile * tl.load(D + d, in_d, 0.0).to(tl.float32)[None, :]
            if z is not None:
                y *= silu(load_tile(z, row, token, d, mask, z_b, z_t, z_d, BLOCK_T))
            store_tile(out, y, row, token, d, mask, L * channels, channels, 1, BLOCK_T)
    if not OUTPUT:
        tl.store(total + (wide_row * segments + at) * channels + d, time, in_d)


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
    B: Tensor  # (rows, G, N, L), fp32: tokens lie side by side, as a tile reads them
    C: Tensor
    document: Tensor | None
    sizes: dict[str, int]  # under the kernels' names


def prepare(u: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> Problem:
    rows, tokens, channels = u.shape
    states = A.shape[1]
    groups = B.shape[2] if B.ndim == 4 else 1
    blocks = groups * triton.cdiv(channels // max(groups, 1), BLOCK_D)
    segment = triton_segments.segment_tokens(rows, tokens, blocks, u.device)
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
        A=(A.float() * math.log2(math.e)).t().contiguous(),
        B=_tokens_last(B),
        C=_tokens_last(C),
        document=None if cu_seqlens is None else document_of_token(cu_seqlens, tokens),
        sizes={
            "L": tokens,
            "channels": channels,
            "states": states,
            "groups": groups,
            "segment": segment,
            "segments": segments,
            "chunks": chunks,
        },
    )


def _tokens_last(x: Tensor) -> Tensor:
    grouped = x if x.ndim == 4 else x.unsqueeze(2)
    return grouped.permute(0, 2, 3, 1).float().contiguous()


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """``<name>_b``, ``_t`` and ``_d`` of every ``(B, L, D)`` tensor."""
    return {
        f"{name}_{axis}": 0 if x is None else x.stride(i) for name, x in tensors.items() for i, axis in enumerate("btd")
    }


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
    p = prepare(u, A, B, C, cu_seqlens)
    packed = cu_seqlens is not None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    out = u.new_empty(u.shape)
    chunk_states = u.new_empty((p.rows, p.chunks, p.states, p.channels), dtype=torch.float32)
    final_state = states_of_empty_documents(u, A, cu_seqlens, initial_state) if output_final_state else None
    if p.tokens > 0:
        enter_rows(chunk_states[:, 0], None if packed else initial_state)
        entering = chunk_states[:, :: p.segment // CHUNK]
        options = {
            "SOFTPLUS": delta_softplus,
            "PACKED": packed,
            "CHUNK": CHUNK,
            "BLOCK_D": BLOCK_D,
            "final_state": final_state,
            "initial_state": initial_state,
            "delta_bias": delta_bias,
            "document": p.document,
        }
        operands = {"u": u, "delta": delta, "A": p.A, "B": p.B} | p.sizes | strides(u=u, delta=delta, z=z) | options
        grid = (p.rows * p.segments * p.blocks,)
        carry = torch.zeros((p.rows, p.segments, p.states, p.channels), dtype=torch.float32, device=u.device)
        if p.segments > 1:
            total = carry.new_empty((p.rows, p.segments, p.channels))
            nothing = dict.fromkeys(("C", "D", "z", "out", "chunk_states"))
            launch(_walk, grid, **{**operands, **nothing, "final_state": None}, carry=carry, total=total, OUTPUT=False)
            triton_segments.pass_states(carry, total, p.A, p.document, entering, p.tokens, p.segment, reverse=False)
        results = {"out": out, "chunk_states": chunk_states, "carry": carry, "total": None}
        launch(_walk, grid, **operands, C=p.C, D=D, z=z, **results, OUTPUT=True)
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
