r"""The scan's backward on Triton, with the gradient g[t] of every state h[t]:

    g[t]      = dy[t] C[t] + a[t+1] g[t+1]       a[t] = exp(delta[t] A),  dy = dout silu(z),  y = C . h + D u
    dB[t]     = sum_d g[t] delta[t] u[t]         dC[t] = sum_d dy[t] h[t]
    du[t]     = delta[t] (g[t] . B[t]) + D dy[t]
    ddelta[t] = u[t] (g[t] . B[t]) + sum_n A g[t] a[t] h[t-1],   where a[t] h[t-1] = h[t] - delta[t] u[t] B[t]
    dA        = sum_t delta[t] g[t] a[t] h[t-1]

Programs walk a segment of a row backward, chunk by chunk: first forward through a chunk from the state kept at its
start, to find the states that enter its tiles, then backward over the tiles. Sums over tokens end in one partial sum a
segment, sums over channels in one a block of them; torch adds those up, in an order that nothing changes.
"""

import triton
import triton.language as tl

from packc.ops.selective_scan.reference import CHUNK
from packc.ops.selective_scan.triton_tokens import clear_states, gated_gradients, place, step_sizes
from packc.ops.tritonsrc.activations import sigmoid, silu_slope
from packc.ops.tritonsrc.launch import autotuned
from packc.ops.tritonsrc.tokens import (
    among,
    arrive,
    at_token,
    channels_of,
    documents_of,
    enter,
    load_channels,
    load_tokens,
    store_own,
    store_token,
    times,
    zeros,
)

_NOT_SPECIALIZED = [
    *("rows", "L", "padded", "segment", "segments", "chunks"),
    *(f"{name}_b" for name in ("u", "delta", "dout", "z", "ddelta")),
]
_APART = [f"{name}_d" for name in ("u", "delta", "dout", "z", "ddelta")]  # apart by a length, if not neighbours
_CONFIGS = [triton.Config({"BLOCK_T": 4}, num_warps=1)]
# All registers there are: ptxas takes fewer of its own accord, for the sake of more warps, and spills.
_BEFORE_HOPPER = [triton.Config({"BLOCK_T": 2}, num_warps=1, maxnreg=255)]
# Room for so many tiles a chunk, whichever is chosen.
TILES = CHUNK // min(config.kwargs["BLOCK_T"] for config in _CONFIGS + _BEFORE_HOPPER)


@autotuned(_CONFIGS, key=["channels", "states", "PACKED"])
@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_APART)
def edges(
    dout,
    dfinal_state,
    delta,
    A,
    C,
    z,
    delta_bias,
    document,
    carry,  # (rows, segments, N, D)
    total,  # (rows, segments, D)
    L,
    padded,
    channels,
    states,
    groups,
    segment,
    segments,
    delta_b,
    delta_t,
    delta_d,
    dout_b,
    dout_t,
    dout_d,
    z_b,
    z_t,
    z_d,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient a g that leaves each segment to the left when none arrives from the right."""
    row, at, _, group, first, end = place(channels, groups, segments, BLOCK_D)
    d = channels_of(first, WIDE, BLOCK_D)
    in_d = d < end
    carry += (row * segments + at) * states * channels
    clear_states(carry, d, in_d, channels, states, BLOCK_D)
    C += (row * groups + group) * states * padded
    begin = at * segment
    tiles = tl.cdiv(tl.minimum(segment, L - begin), BLOCK_T)
    bias = load_channels(delta_bias, d, in_d, BLOCK_D)
    time = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tiles):
        token = begin + (tiles - 1 - i) * BLOCK_T
        raw = load_tokens(at_token(delta, row, token, d, delta_b, delta_t, delta_d), delta_t, token, d, end, L, BLOCK_T)
        dts = step_sizes(raw, bias, token, L, SOFTPLUS, BLOCK_T)
        for r in tl.static_range(BLOCK_T):
            time += dts[r]
        dout_at, z_at = at_token(dout, row, token, d, dout_b, dout_t, dout_d), z
        if z is not None:
            z_at = at_token(z, row, token, d, z_b, z_t, z_d)
        dys = gated_gradients(dout_at, z_at, token, d, end, L, dout_t, z_t, BLOCK_T)
        of = documents_of(document, token, L, PACKED, BLOCK_T)
        for n in range(states):
            m = tl.load(carry + n * channels + d, in_d, 0.0)
            rate = tl.load(A + n * channels + d, in_d, 0.0)
            at_n = tl.cast(n, tl.int64) * padded + token
            for r in tl.static_range(BLOCK_T - 1, -1, -1):
                m = arrive(m, of, r, dfinal_state, d, end, n, channels, states, PACKED)
                m = tl.exp2(dts[r] * rate) * (dys[r] * tl.load(C + at_n + r) + m)
            tl.store(carry + n * channels + d, m, in_d)
        tl.debug_barrier()
    tl.store(total + (row * segments + at) * channels + d, time, in_d)


@triton.jit
def _enter_tiles(
    u,
    delta,
    A,
    B,
    delta_bias,
    document,
    initial_state,
    entering,
    tile_states,
    row,
    token,
    d,
    end,
    tiles,
    L,
    padded,
    channels,
    states,
    u_b,
    u_t,
    u_d,
    delta_b,
    delta_t,
    delta_d,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the state that enters the first of ``tiles`` tiles to those that enter the others."""
    in_d = d < end
    source = entering
    for i in range(tiles - 1):
        raw = load_tokens(at_token(delta, row, token, d, delta_b, delta_t, delta_d), delta_t, token, d, end, L, BLOCK_T)
        bias = load_channels(delta_bias, d, in_d, BLOCK_D)
        dts = step_sizes(raw, bias, token, L, SOFTPLUS, BLOCK_T)
        us = load_tokens(at_token(u, row, token, d, u_b, u_t, u_d), u_t, token, d, end, L, BLOCK_T)
        xs = times(dts, us, BLOCK_T)
        of = documents_of(document, token, L, PACKED, BLOCK_T)
        target = tile_states + (i + 1) * states * channels
        for n in range(states):
            h = tl.load(source + n * channels + d, in_d, 0.0)
            rate = tl.load(A + n * channels + d, in_d, 0.0)
            at_n = tl.cast(n, tl.int64) * padded + token
            for r in tl.static_range(BLOCK_T):
                h = enter(h, of, r, initial_state, d, end, n, channels, states, PACKED)
                h = tl.exp2(dts[r] * rate) * h + xs[r] * tl.load(B + at_n + r)
            tl.store(target + n * channels + d, h, in_d)
        tl.debug_barrier()
        source = target
        token += BLOCK_T


@autotuned(_CONFIGS, key=["channels", "states", "PACKED"], before_hopper=_BEFORE_HOPPER)
@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_APART)
def walk_back(
    dout,
    dfinal_state,
    chunk_states,
    u,
    delta,
    A,  # (N, D), in base 2
    B,  # (rows, G, N, padded), as C
    C,
    D,
    z,
    delta_bias,
    document,
    initial_state,  # (documents, D, N), as its gradient
    arriving,  # (rows, segments, N, D): a g from the right of each segment
    carry,  # as arriving: a g between tiles, in the end from the left of each segment
    tile_states,  # (rows, segments, CHUNK / BLOCK_T, N, D)
    du,
    ddelta,
    dz,
    dA,  # (rows, segments, N, D)
    dB,  # (blocks, rows, N, padded), as dC
    dC,
    dD,  # (rows, segments, D), as ddelta_bias
    ddelta_bias,
    dinitial_state,  # of packed documents
    rows,
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
    dout_b,
    dout_t,
    dout_d,
    z_b,
    z_t,
    z_d,
    ddelta_b,
    ddelta_t,
    ddelta_d,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,  # room for so many a chunk
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, block, group, first, end = place(channels, groups, segments, BLOCK_D)
    if PACKED:  # what is known takes no registers
        row = tl.cast(0, tl.int64)
    d = channels_of(first, WIDE, BLOCK_D)
    in_d = d < end
    segment_of = row * segments + at
    states_of = states * channels
    arriving += segment_of * states_of
    carry += segment_of * states_of
    tile_states += segment_of * TILES * states_of
    dA += segment_of * states_of
    if D is not None:
        dD += segment_of * channels
        tl.store(dD + d, tl.zeros([BLOCK_D], tl.float32), in_d)
    if delta_bias is not None:
        ddelta_bias += segment_of * channels
        tl.store(ddelta_bias + d, tl.zeros([BLOCK_D], tl.float32), in_d)
    clear_states(dA, d, in_d, channels, states, BLOCK_D)
    B += (row * groups + group) * states * padded
    C += (row * groups + group) * states * padded
    dB += (block * rows + row) * states * padded
    dC += (block * rows + row) * states * padded
    begin = at * segment
    length = tl.minimum(segment, L - begin)
    m_source = arriving
    chunks_here = tl.cdiv(length, CHUNK)
    for i in range(chunks_here):
        chunk_token = begin + (chunks_here - 1 - i) * CHUNK
        tiles = tl.cdiv(tl.minimum(CHUNK, L - chunk_token), BLOCK_T)
        entering = chunk_states + (row * chunks + chunk_token // CHUNK) * states_of
        _enter_tiles(
            *(u, delta, A, B, delta_bias, document, initial_state, entering, tile_states, row, chunk_token, d, end),
            *(tiles, L, padded, channels, states, u_b, u_t, u_d, delta_b, delta_t, delta_d),
            *(SOFTPLUS, PACKED, BLOCK_T, BLOCK_D),
        )
        for j in tl.range(tiles, disable_licm=PACKED):  # of what is hoisted out of it, one value too many would spill
            tile = tiles - 1 - j
            token = chunk_token + tile * BLOCK_T
            delta_at = at_token(delta, row, token, d, delta_b, delta_t, delta_d)
            u_at = at_token(u, row, token, d, u_b, u_t, u_d)
            dout_at, z_at = at_token(dout, row, token, d, dout_b, dout_t, dout_d), z
            if z is not None:
                z_at = at_token(z, row, token, d, z_b, z_t, z_d)
            raw = load_tokens(delta_at, delta_t, token, d, end, L, BLOCK_T)
            bias = load_channels(delta_bias, d, in_d, BLOCK_D)
            dts = step_sizes(raw, bias, token, L, SOFTPLUS, BLOCK_T)
            xs = times(dts, load_tokens(u_at, u_t, token, d, end, L, BLOCK_T), BLOCK_T)
            dys = gated_gradients(dout_at, z_at, token, d, end, L, dout_t, z_t, BLOCK_T)
            of = documents_of(document, token, L, PACKED, BLOCK_T)
            h_source = tile_states + tile * states_of
            if tile == 0:
                h_source = entering
            ys = zeros(BLOCK_T, BLOCK_D)
            dxs = zeros(BLOCK_T, BLOCK_D)  # g . B
            dtimes = zeros(BLOCK_T, BLOCK_D)  # through the decays, A in base 2
            for n in range(states):
                h = tl.load(h_source + n * channels + d, in_d, 0.0)
                m = tl.load(m_source + n * channels + d, in_d, 0.0)
                rate = tl.load(A + n * channels + d, in_d, 0.0)
                dA_n = tl.load(dA + n * channels + d, in_d, 0.0)
                at_n = tl.cast(n, tl.int64) * padded + token
                decays, decayed, new_ys, new_dxs, new_dtimes = (), (), (), (), ()
                for r in tl.static_range(BLOCK_T):
                    a = tl.exp2(dts[r] * rate)
                    ah = a * enter(h, of, r, initial_state, d, end, n, channels, states, PACKED)
                    h = ah + xs[r] * tl.load(B + at_n + r)
                    decays, decayed = decays + (a,), decayed + (ah,)
                    tl.store(dC + at_n + r, tl.sum(dys[r] * h, 0))
                    if z is not None:
                        new_ys = new_ys + (ys[r] + h * tl.load(C + at_n + r),)
                for r in tl.static_range(BLOCK_T - 1, -1, -1):
                    m = arrive(m, of, r, dfinal_state, d, end, n, channels, states, PACKED)
                    g = dys[r] * tl.load(C + at_n + r) + m
                    m = decays[r] * g
                    if PACKED and dinitial_state is not None:
                        if of[r] != of[r + 1]:
                            store_own(dinitial_state, m, of[r + 1], d, end, n, channels, states)
                    tl.store(dB + at_n + r, tl.sum(g * xs[r], 0))
                    through = g * decayed[r]
                    new_dxs = (dxs[r] + g * tl.load(B + at_n + r),) + new_dxs
                    new_dtimes = (dtimes[r] + through * rate,) + new_dtimes
                    dA_n += through * dts[r]
                dxs, dtimes = new_dxs, new_dtimes
                if z is not None:
                    ys = new_ys
                tl.store(carry + n * channels + d, m, in_d)
                tl.store(dA + n * channels + d, dA_n, in_d)
            tl.debug_barrier()
            m_source = carry
            du_at = at_token(du, row, token, d, L, channels, 1)
            ddelta_at = at_token(ddelta, row, token, d, ddelta_b, ddelta_t, ddelta_d)
            dz_at = dz
            if z is not None:
                dz_at = at_token(dz, row, token, d, L, channels, 1)
            # Read again, and sums kept in memory: registers are the loop's over states.
            bias = load_channels(delta_bias, d, in_d, BLOCK_D)
            skip = load_channels(D, d, in_d, BLOCK_D)
            sum_dD = tl.zeros([BLOCK_D], tl.float32)
            sum_dbias = tl.zeros([BLOCK_D], tl.float32)
            for r in tl.static_range(BLOCK_T):
                in_t = token + r < L
                inside = among(d, end, in_t)
                u_r = tl.load(u_at + r * u_t, inside, 0.0).to(tl.float32)
                ddelta_r = dtimes[r] * 0.6931471805599453 + dxs[r] * u_r
                if SOFTPLUS:
                    ddelta_r *= sigmoid(tl.load(delta_at + r * delta_t, inside, 0.0).to(tl.float32) + bias)
                store_token(ddelta_at + r * ddelta_t, ddelta_r, d, end, in_t)
                store_token(du_at + r * channels, dxs[r] * dts[r] + dys[r] * skip, d, end, in_t)
                sum_dbias += tl.where(inside, ddelta_r, 0.0)
                sum_dD += dys[r] * u_r
                if z is not None:
                    z_r = tl.load(z_at + r * z_t, inside, 0.0).to(tl.float32)
                    dout_r = tl.load(dout_at + r * dout_t, inside, 0.0).to(tl.float32)
                    dz_r = dout_r * (ys[r] + skip * u_r) * silu_slope(z_r)
                    store_token(dz_at + r * channels, dz_r, d, end, in_t)
            if D is not None:
                tl.store(dD + d, tl.load(dD + d, in_d, 0.0) + sum_dD, in_d)
            if delta_bias is not None:
                tl.store(ddelta_bias + d, tl.load(ddelta_bias + d, in_d, 0.0) + sum_dbias, in_d)
