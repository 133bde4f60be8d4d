"""The linear scan's backward on Triton, with the gradient dh[t] of every state:

    dh[t] = dout[t] + a[t+1] dh[t+1]      db[t] = dh[t]      da[t] = dh[t] h[t-1]

Programs walk a segment of a row backward, tile by tile: first forward from the state kept in front of the tile's chunk,
then backward through the tile, all in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packc.ops.linear_scan.reference import CHUNK
from packc.ops.linear_scan.triton_forward import (
    APART,
    CONFIGS,
    NOT_SPECIALIZED,
    Problem,
    load_decays,
    no_states,
    place,
    states_of_empty_documents,
)
from packc.ops.tritonsrc.launch import autotuned, launch
from packc.ops.tritonsrc.tokens import (
    among,
    arrive,
    at_token,
    channels_of,
    countable,
    documents_of,
    enter,
    load_tokens,
    store_own,
    store_token,
    strides,
)

# Tiles of 16 tokens, three tensors of them, would not fit registers.
_CONFIGS = [triton.Config({"BLOCK_T": 8}, num_warps=2), triton.Config({"BLOCK_T": 4}, num_warps=1)]


@autotuned(CONFIGS, key=["channels"])
@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=APART)
def edges(
    dout,
    dfinal_state,
    a,
    document,
    local,  # (rows, segments, D), as product
    product,
    L,
    channels,
    segment,
    segments,
    a_b,
    a_t,
    a_d,
    dout_b,
    dout_t,
    dout_d,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient a dh that leaves each segment to the left when none arrives from the right; and its decays."""
    row, at, first = place(channels, segments, BLOCK_D)
    d = channels_of(first, WIDE, BLOCK_D)
    document += row * L
    segment_of = (row * segments + at) * channels
    m = tl.zeros([BLOCK_D], tl.float32)
    decay = tl.full([BLOCK_D], 1.0, tl.float32)
    begin = at * segment
    tiles = tl.cdiv(tl.minimum(segment, L - begin), BLOCK_T)
    for i in range(tiles):
        token = begin + (tiles - 1 - i) * BLOCK_T
        decays = load_decays(at_token(a, row, token, d, a_b, a_t, a_d), a_t, token, d, channels, L, BLOCK_T)
        dout_at = at_token(dout, row, token, d, dout_b, dout_t, dout_d)
        douts = load_tokens(dout_at, dout_t, token, d, channels, L, BLOCK_T)
        of = documents_of(document, token, L, True, BLOCK_T)
        for r in tl.static_range(BLOCK_T - 1, -1, -1):
            m = arrive(m, of, r, dfinal_state, d, channels, 0, channels, 1, True)
            m = decays[r] * (douts[r] + m)
            decay *= decays[r]
    tl.store(local + segment_of + d, m, d < channels)
    tl.store(product + segment_of + d, decay, d < channels)


@triton.jit
def _walk_tile(h, decays, inputs, of, initial_state, d, channels, BLOCK_T: tl.constexpr):
    """The states that enter a tile's tokens, and the one that leaves it."""
    befores = ()
    for r in tl.static_range(BLOCK_T):
        h = enter(h, of, r, initial_state, d, channels, 0, channels, 1, True)
        befores = befores + (h,)
        h = decays[r] * h + inputs[r]
    return befores, h


@autotuned(_CONFIGS, key=["channels"])
@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=APART)
def _walk_back(
    dout,
    dfinal_state,  # (documents, D), as initial_state and its gradient
    chunk_states,  # (rows, L // CHUNK, D)
    a,
    b,
    document,
    initial_state,
    arriving,  # (rows, segments, D): a dh from the right of each segment
    da,  # (rows, L, D), as db
    db,
    dinitial_state,
    L,
    channels,
    segment,
    segments,
    a_b,
    a_t,
    a_d,
    b_b,
    b_t,
    b_d,
    dout_b,
    dout_t,
    dout_d,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, first = place(channels, segments, BLOCK_D)
    d = channels_of(first, WIDE, BLOCK_D)
    document += row * L
    m = tl.zeros([BLOCK_D], tl.float32)
    if arriving is not None:
        m = tl.load(arriving + (row * segments + at) * channels + d, d < channels, 0.0)
    begin = at * segment
    tiles = tl.cdiv(tl.minimum(segment, L - begin), BLOCK_T)
    for i in range(tiles):
        token = begin + (tiles - 1 - i) * BLOCK_T
        chunk = token // CHUNK
        kept = chunk_states + (row * (L // CHUNK) + chunk - 1) * channels + d
        h = tl.load(kept, among(d, channels, chunk > 0), 0.0)
        for j in range((token - chunk * CHUNK) // BLOCK_T):
            t = chunk * CHUNK + j * BLOCK_T
            decays = load_decays(at_token(a, row, t, d, a_b, a_t, a_d), a_t, t, d, channels, L, BLOCK_T)
            inputs = load_tokens(at_token(b, row, t, d, b_b, b_t, b_d), b_t, t, d, channels, L, BLOCK_T)
            of = documents_of(document, t, L, True, BLOCK_T)
            _, h = _walk_tile(h, decays, inputs, of, initial_state, d, channels, BLOCK_T)
        decays = load_decays(at_token(a, row, token, d, a_b, a_t, a_d), a_t, token, d, channels, L, BLOCK_T)
        inputs = load_tokens(at_token(b, row, token, d, b_b, b_t, b_d), b_t, token, d, channels, L, BLOCK_T)
        of = documents_of(document, token, L, True, BLOCK_T)
        befores, _ = _walk_tile(h, decays, inputs, of, initial_state, d, channels, BLOCK_T)
        dout_at = at_token(dout, row, token, d, dout_b, dout_t, dout_d)
        douts = load_tokens(dout_at, dout_t, token, d, channels, L, BLOCK_T)
        da_at = at_token(da, row, token, d, L, channels, 1)
        db_at = at_token(db, row, token, d, L, channels, 1)
        for r in tl.static_range(BLOCK_T - 1, -1, -1):
            m = arrive(m, of, r, dfinal_state, d, channels, 0, channels, 1, True)
            dh = douts[r] + m
            m = decays[r] * dh
            store_token(da_at + r * channels, dh * befores[r], d, channels, token + r < L)
            store_token(db_at + r * channels, dh, d, channels, token + r < L)
            if dinitial_state is not None:
                if of[r] != of[r + 1]:
                    store_own(dinitial_state, m, of[r + 1], d, channels, 0, channels, 1)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, a, b = countable(dout, a, b)
    p = Problem(b, cu_seqlens, a, dout)
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    dinitial = None if initial_state is None else states_of_empty_documents(b, cu_seqlens, dfinal_state)
    shared = {"dout": dout, "dfinal_state": dfinal_state, "a": a, **strides(a=a, dout=dout), **p.shared}
    arriving = None
    if p.segments > 1:
        local, product = p.of_segments(b), p.of_segments(b)
        launch(edges, p.grid, **shared, local=local, product=product)
        arriving = p.enter_segments(local, product, reverse=True)
    launch(
        _walk_back,
        p.grid,
        **shared,
        **strides(b=b),
        b=b,
        chunk_states=chunk_states,
        initial_state=initial_state,
        arriving=arriving,
        da=da,
        db=db,
        dinitial_state=dinitial,
        CHUNK=CHUNK,
    )
    return da, db, no_states(b) if dinitial is None else dinitial
