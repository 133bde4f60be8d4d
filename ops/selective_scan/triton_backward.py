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

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.selective_scan import triton_segments
from packc.ops.selective_scan.reference import CHUNK
from packc.ops.selective_scan.triton_forward import BLOCK_D, enter_rows, prepare, states_of_empty_documents, strides
from packc.ops.selective_scan.triton_tile import (
    boundaries,
    load_tile,
    pick_token,
    place,
    raw_step_sizes,
    scan,
    scan_back,
    step_sizes,
    store_tile,
)
from packc.ops.tritonsrc.activations import silu, silu_slope
from packc.ops.tritonsrc.launch import autotuned, launch

_NOT_SPECIALIZED = [
    *("L", "segment", "segments", "chunks"),
    *(f"{name}_{axis}" for name in ("u", "delta", "dout", "z", "ddelta") for axis in "btd"),
]
_CONFIGS = [
    triton.Config({"BLOCK_T": 4}, num_warps=1),
    triton.Config({"BLOCK_T": 8}, num_warps=1),
    triton.Config({"BLOCK_T": 8}, num_warps=2),
    triton.Config({"BLOCK_T": 16}, num_warps=2),
]


@triton.jit
def _gated(dout, z, row, token, d, mask, dout_b, dout_t, dout_d, z_b, z_t, z_d, BLOCK_T: tl.constexpr):
    """dy, the gradient in front of the gate."""
    dy = load_tile(dout, row, token, d, mask, dout_b, dout_t, dout_d, BLOCK_T)
    if z is not None:
        dy *= silu(load_tile(z, row, token, d, mask, z_b, z_t, z_d, BLOCK_T))
    return dy


@triton.jit
def _reach(dy, C, dfinal_state, here, d, mask, ends, boundary, channels, states, n, PACKED: tl.constexpr):
    """What reaches h[t] other than through h[t+1]: through y, and through the final state of a document that ends."""
    c = dy * C[:, None]
    if dfinal_state is not None and PACKED:
        if boundary:
            own = dfinal_state + (here * channels + d[None, :]) * states + n
            c += tl.load(own, mask & ends, 0.0).to(tl.float32)
    return c


@autotuned(_CONFIGS, key=["channels", "states", "PACKED"])
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _edges(
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient a g that leaves each segment to the left when none arrives from the right."""
    row, at, _, group, first, stop = place(channels, groups, segments, BLOCK_D)
    d = first + tl.arange(0, BLOCK_D)
    in_d = d < stop
    inner = tl.arange(0, BLOCK_T)
    wide_row = row.to(tl.int64)
    carry += (wide_row * segments + at) * states * channels
    C += (wide_row * groups + group) * states * L
    begin = at * segment
    tiles = tl.cdiv(tl.minimum(segment, L - begin), BLOCK_T)
    time = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tiles):
        token = begin + (tiles - 1 - i) * BLOCK_T
        in_t = token + inner < L
        mask = in_t[:, None] & in_d[None, :]
        raw = raw_step_sizes(delta, delta_bias, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T)
        dt = step_sizes(raw, mask, SOFTPLUS)
        time += tl.sum(dt, 0)
        dy = _gated(dout, z, row, token, d, mask, dout_b, dout_t, dout_d, z_b, z_t, z_d, BLOCK_T)
        here, starts, ends, boundary = boundaries(document, token, L, PACKED, BLOCK_T)
        for n in range(states):
            a = tl.exp2(dt * tl.load(A + n * channels + d, in_d, 0.0)[None, :])
            C_n = tl.load(C + tl.cast(n, tl.int64) * L + token + inner, in_t, 0.0)
            c = _reach(dy, C_n, dfinal_state, here, d, mask, ends, boundary, channels, states, n, PACKED)
            arriving = tl.load(carry + n * channels + d, in_d, 0.0)
            g = scan_back(a, c, arriving, starts, ends, boundary, BLOCK_T)
            tl.store(carry + n * channels + d, pick_token(a * g, 0, BLOCK_T), in_d)
        tl.debug_barrier()
    tl.store(total + (wide_row * segments + at) * channels + d, time, in_d)


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
    in_d,
    tiles,
    L,
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
):
    """From the state that enters the first of ``tiles`` tiles to those that enter the others."""
    inner = tl.arange(0, BLOCK_T)
    source = entering
    for i in range(tiles - 1):
        in_t = token + inner < L
        mask = in_t[:, None] & in_d[None, :]
        raw = raw_step_sizes(delta, delta_bias, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T)
        dt = step_sizes(raw, mask, SOFTPLUS)
        x = dt * load_tile(u, row, token, d, mask, u_b, u_t, u_d, BLOCK_T)
        here, starts, _, boundary = boundaries(document, token, L, PACKED, BLOCK_T)
        target = tile_states + (i + 1) * states * channels
        for n in range(states):
            a = tl.exp2(dt * tl.load(A + n * channels + d, in_d, 0.0)[None, :])
            b = x * tl.load(B + tl.cast(n, tl.int64) * L + token + inner, in_t, 0.0)[:, None]
            if initial_state is not None and PACKED:
                if boundary:
                    own = initial_state + (here * channels + d[None, :]) * states + n
                    b += a * tl.load(own, mask & starts, 0.0).to(tl.float32)
            h = scan(a, b, tl.load(source + n * channels + d, in_d, 0.0), starts, boundary, BLOCK_T)
            tl.store(target + n * channels + d, pick_token(h, BLOCK_T - 1, BLOCK_T), in_d)
        tl.debug_barrier()
        source = target
        token += BLOCK_T


@autotuned(_CONFIGS, key=["channels", "states", "PACKED"])
@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _walk_back(
    dout,
    dfinal_state,
    chunk_states,
    u,
    delta,
    A,  # (N, D), in base 2
    B,  # (rows, G, N, L), as C
    C,
    D,
    z,
    delta_bias,
    document,
    initial_state,  # (documents, D, N), as its gradient
    arriving,  # (rows, segments, N, D): a g from the right of each segment, then between tiles
    tile_states,  # (rows, segments, CHUNK / BLOCK_T, N, D)
    du,
    ddelta,
    dz,
    dA,  # (rows, segments, N, D)
    dB,  # (blocks, rows, N, L), as dC
    dC,
    dD,  # (rows, segments, D), as ddelta_bias
    ddelta_bias,
    dinitial_state,
    rows,
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
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,  # room for so many a chunk
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, block, group, first, stop = place(channels, groups, segments, BLOCK_D)
    d = first + tl.arange(0, BLOCK_D)
    in_d = d < stop
    inner = tl.arange(0, BLOCK_T)
    wide_row = row.to(tl.int64)
    segment_of = wide_row * segments + at
    states_of = states * channels
    arriving += segment_of * states_of
    tile_states += segment_of * TILES * states_of
    dA += segment_of * states_of
    B += (wide_row * groups + group) * states * L
    C += (wide_row * groups + group) * states * L
    partial = (block.to(tl.int64) * rows + row) * states * L
    dB += partial
    dC += partial
    begin = at * segment
    length = tl.minimum(segment, L - begin)
    skip = tl.zeros([BLOCK_D], tl.float32)
    if D is not None:
        skip = tl.load(D + d, in_d, 0.0).to(tl.float32)
    sum_dD = tl.zeros([BLOCK_D], tl.float32)
    sum_dbias = tl.zeros([BLOCK_D], tl.float32)
    here_chunks = tl.cdiv(length, CHUNK)
    for i in range(here_chunks):
        chunk_token = begin + (here_chunks - 1 - i) * CHUNK
        tiles = tl.cdiv(tl.minimum(CHUNK, L - chunk_token), BLOCK_T)
        entering = chunk_states + (wide_row * chunks + chunk_token // CHUNK) * states_of
        _enter_tiles(
            *(u, delta, A, B, delta_bias, document, initial_state, entering, tile_states, row, chunk_token, d, in_d),
            *(tiles, L, channels, states, u_b, u_t, u_d, delta_b, delta_t, delta_d, SOFTPLUS, PACKED, BLOCK_T),
        )
        for j in range(tiles):
            tile = tiles - 1 - j
            token = chunk_token + tile * BLOCK_T
            in_t = token + inner < L
            mask = in_t[:, None] & in_d[None, :]
            raw = raw_step_sizes(delta, delta_bias, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T)
            dt = step_sizes(raw, mask, SOFTPLUS)
            u_tile = load_tile(u, row, token, d, mask, u_b, u_t, u_d, BLOCK_T)
            x = dt * u_tile
            dy = _gated(dout, z, row, token, d, mask, dout_b, dout_t, dout_d, z_b, z_t, z_d, BLOCK_T)
            here, starts, ends, boundary = boundaries(document, token, L, PACKED, BLOCK_T)
            source = tile_states + tile * states_of
            if tile == 0:
                source = entering
            y = u_tile * skip[None, :]
            dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)  # g . B
            dtime = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)  # through the decays, A in base 2
            for n in range(states):
                rate = tl.load(A + n * channels + d, in_d, 0.0)
                a = tl.exp2(dt * rate[None, :])
                at_n = tl.cast(n, tl.int64) * L + token + inner
                B_n = tl.load(B + at_n, in_t, 0.0)
                C_n = tl.load(C + at_n, in_t, 0.0)
                b = x * B_n[:, None]
                own_input = b
                own_state = (here * channels + d[None, :]) * states + n
                if initial_state is not None and PACKED:
                    if boundary:
                        b += a * tl.load(initial_state + own_state, mask & starts, 0.0).to(tl.float32)
                h = scan(a, b, tl.load(source + n * channels + d, in_d, 0.0), starts, boundary, BLOCK_T)
                c = _reach(dy, C_n, dfinal_state, here, d, mask, ends, boundary, channels, states, n, PACKED)
                from_right = tl.load(arriving + n * channels + d, in_d, 0.0)
                g = scan_back(a, c, from_right, starts, ends, boundary, BLOCK_T)
                tl.store(dB + at_n, tl.sum(g * x, 1), in_t)
                tl.store(dC + at_n, tl.sum(dy * h, 1), in_t)
                y += h * C_n[:, None]
                dx += g * B_n[:, None]
                dexponent = g * (h - own_input)
                dtime += dexponent * rate[None, :]
                dA_n = tl.load(dA + n * channels + d, in_d, 0.0)
                tl.store(dA + n * channels + d, dA_n + tl.sum(dexponent * dt, 0), in_d)
                leaving = a * g
                tl.store(arriving + n * channels + d, pick_token(leaving, 0, BLOCK_T), in_d)
                if dinitial_state is not None:
                    if PACKED:
                        if boundary:
                            tl.store(dinitial_state + own_state, leaving, mask & starts)
                    else:
                        if token == 0:
                            own = dinitial_state + (wide_row * channels + d) * states + n
                            tl.store(own, pick_token(leaving, 0, BLOCK_T), in_d)
            tl.debug_barrier()
            dtime = dtime * 0.6931471805599453 + dx * u_tile
            if SOFTPLUS:
                dtime *= tl.sigmoid(raw)
            store_tile(ddelta, dtime, row, token, d, mask, ddelta_b, ddelta_t, ddelta_d, BLOCK_T)
            sum_dbias += tl.sum(tl.where(mask, dtime, 0.0), 0)
            sum_dD += tl.sum(dy * u_tile, 0)
            du_tile = dx * dt + dy * skip[None, :]
            store_tile(du, du_tile, row, token, d, mask, L * channels, channels, 1, BLOCK_T)
            if z is not None:
                z_tile = load_tile(z, row, token, d, mask, z_b, z_t, z_d, BLOCK_T)
                dout_tile = load_tile(dout, row, token, d, mask, dout_b, dout_t, dout_d, BLOCK_T)
                dz_tile = dout_tile * y * silu_slope(z_tile)
                store_tile(dz, dz_tile, row, token, d, mask, L * channels, channels, 1, BLOCK_T)
    if D is not None:
        tl.store(dD + segment_of * channels + d, sum_dD, in_d)
    if delta_bias is not None:
        tl.store(ddelta_bias + segment_of * channels + d, sum_dbias, in_d)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
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
    channel_first_ddelta: bool,
) -> tuple[Tensor, ...]:
    p = prepare(u, A, B, C, cu_seqlens)
    packed = cu_seqlens is not None
    initial_state = None if initial_state is None else initial_state.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    du, dz = u.new_empty(u.shape), None if z is None else z.new_empty(z.shape)
    ddelta = _empty_delta(delta, channel_first_ddelta)
    dinitial = None if initial_state is None else states_of_empty_documents(u, A, cu_seqlens, dfinal_state)

    def partial_sums(*shape: int) -> Tensor:
        return u.new_zeros((p.rows, p.segments, *shape), dtype=torch.float32)

    arriving, dA = partial_sums(p.states, p.channels), partial_sums(p.states, p.channels)
    dD = None if D is None else partial_sums(p.channels)
    dbias = None if delta_bias is None else partial_sums(p.channels)
    dB, dC = (u.new_empty((p.blocks, p.rows, p.states, p.tokens), dtype=torch.float32) for _ in range(2))
    if p.tokens > 0:
        enter_rows(arriving[:, -1], None if packed else dfinal_state)
        shared = p.sizes | strides(delta=delta, dout=dout, z=z)
        shared |= {"SOFTPLUS": delta_softplus, "PACKED": packed, "BLOCK_D": BLOCK_D}
        shared |= {"dout": dout, "dfinal_state": dfinal_state, "delta": delta, "A": p.A, "C": p.C, "z": z}
        shared |= {"delta_bias": delta_bias, "document": p.document}
        grid = (p.rows * p.segments * p.blocks,)
        if p.segments > 1:
            carry, total = partial_sums(p.states, p.channels), partial_sums(p.channels)
            launch(_edges, grid, **{k: x for k, x in shared.items() if k != "chunks"}, carry=carry, total=total)
            triton_segments.pass_states(carry, total, p.A, p.document, arriving, p.tokens, p.segment, reverse=True)
        tiles = CHUNK // min(config.kwargs["BLOCK_T"] for config in _walk_back.configs)
        launch(
            _walk_back,
            grid,
            **shared,
            **strides(u=u, ddelta=ddelta),
            chunk_states=chunk_states,
            u=u,
            B=p.B,
            D=D,
            initial_state=initial_state,
            arriving=arriving,
            tile_states=u.new_empty((p.rows, p.segments, tiles, p.states, p.channels), dtype=torch.float32),
            **{"du": du, "ddelta": ddelta, "dz": dz, "dA": dA, "dB": dB, "dC": dC, "dD": dD, "ddelta_bias": dbias},
            dinitial_state=dinitial,
            rows=p.rows,
            CHUNK=CHUNK,
            TILES=tiles,
        )
    return (
        du,
        ddelta,
        dA.sum((0, 1)).t().to(A.dtype, memory_format=torch.contiguous_format),
        _over_blocks(dB, B),
        _over_blocks(dC, C),
        *(u.new_empty(0) if x is None else part.sum((0, 1)).to(x.dtype) for x, part in ((D, dD),)),
        u.new_empty(0) if dz is None else dz,
        *(u.new_empty(0) if x is None else part.sum((0, 1)).to(x.dtype) for x, part in ((delta_bias, dbias),)),
        u.new_empty(0) if initial_state is None else dinitial.to(initial_state.dtype),
    )


def _empty_delta(delta: Tensor, channel_first: bool) -> Tensor:
    if not channel_first:
        return delta.new_empty(delta.shape)
    rows, tokens, channels = delta.shape
    return delta.new_empty((rows, channels, tokens)).transpose(1, 2)


def _over_blocks(partial: Tensor, x: Tensor) -> Tensor:
    """From ``(blocks, rows, N, L)`` to the gradient of B or C."""
    groups = x.shape[2] if x.ndim == 4 else 1
    summed = partial.unflatten(0, (groups, -1)).sum(1) if groups else partial.new_zeros((0, *partial.shape[1:]))
    return summed.permute(1, 3, 0, 2).reshape(x.shape).to(x.dtype, memory_format=torch.contiguous_format)
