"""The scan's forward on Triton: programs walk a segment of a row for a block of channels, tile by tile.

States live in registers, one vector a state, as many as there are for; more of them go by groups, which live in memory
between tiles. What lies at the start of a chunk is kept for the backward.
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
from packc.ops.selective_scan.triton_tokens import clear_states, padded_tokens, place, step_sizes
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
    load_channels,
    load_own,
    load_tokens,
    store_own,
    store_token,
    strides,
    times,
    wide,
    zeros,
)

BLOCK_D = 64  # channels of a program: a thread has two, which share loads of B and C
WARPS = 12  # that a processor has registers for
GROUP = 16  # states that are walked together


@triton.jit
def _load_states(at, first, d, end, channels, states, GROUP: tl.constexpr):
    """Of ``(N, D)``, states ``first ..`` as a tuple of vectors; zero behind the last."""
    found = ()
    for n in tl.static_range(GROUP):
        found = found + (tl.load(at + (first + n) * channels + d, among(d, end, first + n < states), 0.0),)
    return found


@triton.jit
def _store_states(at, values, first, d, end, channels, states, GROUP: tl.constexpr):
    for n in tl.static_range(GROUP):
        tl.store(at + (first + n) * channels + d, values[n], among(d, end, first + n < states))


@triton.jit
def _walk_tile(
    hs,
    rates,
    dts,
    xs,
    ys,
    of,
    initial_state,
    final_state,
    pairs,  # of the tile's first token, and of state ``first``
    pairs_t,
    first,
    d,
    end,
    channels,
    states,
    PACKED: tl.constexpr,
    OUTPUT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """From the states in front of a tile to those behind it, and y with what they add."""
    outputs = ()
    for r in tl.static_range(BLOCK_T):
        if PACKED:
            if (of[r] != of[r + 1]) & (of[r + 1] >= 0):
                tl.debug_barrier()  # a branch: to select would be an instruction a state of every token
                own = ()
                for n in tl.static_range(GROUP):
                    h = tl.zeros(hs[n].shape, tl.float32)
                    if initial_state is not None:
                        in_n = tl.where(first + n < states, end, 0)
                        h = load_own(initial_state, of[r + 1], d, in_n, first + n, channels, states)
                    own = own + (h,)
                hs = own
        y, new = ys[r], ()
        for n in tl.static_range(GROUP):
            pair = tl.load(pairs + r * pairs_t + n, first + n < states, 0)
            h = tl.exp2(dts[r] * rates[n]) * hs[n] + xs[r] * pair.to(tl.int32).to(tl.float32, bitcast=True)
            if OUTPUT:
                y += h * (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            new = new + (h,)
        hs, outputs = new, outputs + (y,)
        if OUTPUT and PACKED and final_state is not None:
            if of[r + 1] != of[r + 2]:
                for n in tl.static_range(GROUP):
                    in_n = tl.where(first + n < states, end, 0)
                    store_own(final_state, hs[n], of[r + 1], d, in_n, first + n, channels, states)
    return hs, outputs


@autotuned(
    [triton.Config({"BLOCK_T": 4}, num_warps=1)],
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
    pairs,  # (rows, padded, G, N): of B and C, as one number
    D,
    z,
    delta_bias,
    document,
    initial_state,  # (documents, D, N), as final_state
    out,  # (rows, L, D)
    final_state,
    chunk_states,  # (rows, chunks, N, D)
    carry,  # (rows, segments, N, D): states behind each segment
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
    RESIDENT: tl.constexpr,  # all states are one group, which stays in registers
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
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
    pairs += ((row * padded + begin) * groups + group) * states
    bias = load_channels(delta_bias, d, in_d, BLOCK_D)
    entering = carry
    if OUTPUT:
        chunk_states += row * chunks * states_of
        entering = chunk_states + (begin // CHUNK).to(tl.int64) * states_of
        skip = load_channels(D, d, in_d, BLOCK_D)
    elif not RESIDENT:
        clear_states(carry, d, in_d, channels, states, BLOCK_D)
    if RESIDENT:
        rates = _load_states(A, 0, d, end, channels, GROUP, GROUP)
        hs = zeros(GROUP, BLOCK_D)
        if OUTPUT:
            hs = _load_states(entering, 0, d, end, channels, GROUP, GROUP)
    time = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.cdiv(stop - begin, BLOCK_T)):
        token = begin + i * BLOCK_T
        raw = load_tokens(at_token(delta, row, token, d, delta_b, delta_t, delta_d), delta_t, token, d, end, L, BLOCK_T)
        dts = step_sizes(raw, bias, token, L, SOFTPLUS, BLOCK_T)
        u_at = at_token(u, row, token, d, u_b, u_t, u_d)
        xs = times(dts, load_tokens(u_at, u_t, token, d, end, L, BLOCK_T), BLOCK_T)
        of = documents_of(document, token, L, PACKED, BLOCK_T)
        pairs_at = pairs + tl.cast(i * BLOCK_T, tl.int64) * groups * states
        if not OUTPUT:
            for r in tl.static_range(BLOCK_T):
                time += dts[r]
        ys = zeros(BLOCK_T, BLOCK_D)
        if RESIDENT:
            if OUTPUT:
                if (token % CHUNK == 0) & (i > 0):
                    kept = chunk_states + (token // CHUNK).to(tl.int64) * states_of
                    _store_states(kept, hs, 0, d, end, channels, GROUP, GROUP)
            hs, ys = _walk_tile(
                *(hs, rates, dts, xs, ys, of, initial_state, final_state, pairs_at, groups * GROUP, 0, d, end),
                *(channels, GROUP, PACKED, OUTPUT, GROUP, BLOCK_T),
            )
        else:
            leaving = carry
            if OUTPUT:
                if ((token + BLOCK_T) % CHUNK == 0) & (token + BLOCK_T < stop):
                    leaving = chunk_states + ((token + BLOCK_T) // CHUNK).to(tl.int64) * states_of
            for first_n in range(0, states, GROUP):
                rates = _load_states(A, first_n, d, end, channels, states, GROUP)
                hs = _load_states(entering, first_n, d, end, channels, states, GROUP)
                hs, ys = _walk_tile(
                    *(hs, rates, dts, xs, ys, of, initial_state, final_state, pairs_at + first_n, groups * states),
                    *(first_n, d, end, channels, states, PACKED, OUTPUT, GROUP, BLOCK_T),
                )
                _store_states(leaving, hs, first_n, d, end, channels, states, GROUP)
            entering = leaving
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
    if RESIDENT:
        _store_states(carry, hs, 0, d, end, channels, GROUP, GROUP)
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
    document: Tensor | None
    sizes: dict[str, int]  # under the kernels' names


def prepare(u: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None, block_d: int, warps: int) -> Problem:
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


def pairs_of(B: Tensor, C: Tensor | None) -> Tensor:
    """fp32 B and C of every token side by side, as one int64, which is loaded at once: ``(rows, padded L, G, N)``."""
    tokens, padded = B.shape[1], padded_tokens(B.shape[1])
    pairs = B.new_empty((B.shape[0], padded, *B.shape[2:], 2), dtype=torch.float32)
    if padded > tokens:
        pairs[:, tokens:].zero_()
    pairs[:, :tokens, ..., 0].copy_(B)
    if C is not None:
        pairs[:, :tokens, ..., 1].copy_(C)
    return pairs.view(torch.int64)


def resident(states: int) -> dict[str, Any]:
    """How many states are walked together, and whether these are all."""
    return {"RESIDENT": 0 < states <= GROUP, "GROUP": states if 0 < states <= GROUP else GROUP}


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
    p = prepare(u, A, B, cu_seqlens, BLOCK_D, WARPS)
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
        operands: dict[str, Any] = {"u": u, "delta": delta, "A": p.A, **strides(u=u, delta=delta, z=z)}
        operands |= (
            p.sizes | options | {"pairs": pairs_of(B, C), "padded": padded_tokens(p.tokens)} | resident(p.states)
        )
        grid = (p.rows * p.segments * p.blocks,)
        carry = u.new_empty((p.rows, p.segments, p.states, p.channels), dtype=torch.float32)
        if p.segments > 1:
            total = carry.new_empty((p.rows, p.segments, p.channels))
            nothing = dict.fromkeys(("D", "z", "out", "chunk_states", "final_state"))
            launch(walk, grid, **{**operands, **nothing}, carry=carry, total=total, OUTPUT=False)
            pass_states(carry, total, p.A, p.document, entering, p.tokens, p.segment, reverse=False)
        results = {"out": out, "chunk_states": chunk_states, "carry": carry, "total": None}
        launch(walk, grid, **operands, D=D, z=z, **results, OUTPUT=True)
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
