"""dq and dk on Triton: from the scores, from the states that enter or leave a chunk, and what these owe to decays."""

from __future__ import annotations

import triton
import triton.language as tl

from packc.ops.common.triton_chunks import (
    HALF,
    chunk_of,
    load_between,
    load_per_token,
    load_tile,
    store_per_token,
    store_tile,
)
from packc.ops.common.triton_products import (
    dot_by_computed,
    dot_computed,
    from_start,
    log_decays,
    to_end,
    whole,
)
from packc.ops.linear_attention.triton_states import BEFORE_HOPPER
from packc.ops.tritonsrc.launch import autotuned

_EIGHT = triton.Config({}, num_warps=8, num_stages=1, maxnreg=255)


@autotuned([*BEFORE_HOPPER, _EIGHT], key=["K", "V", "KEYS"], before_hopper=BEFORE_HOPPER)
@triton.jit(
    do_not_specialize=[
        *("slots", "other_b", "own_b", "g_b", "step_b", "x_b", "dx_b", "dg_b", "per_part", "per_block", "parts")
    ]
)
def grad_qk(
    other,  # (rows, L, groups, K): q for dk, k for dq
    own,  # the other one
    x,  # (rows, L, heads, V): v for dk, the gradient of out for dq
    g,
    step,
    table,
    kept,
    dkept,
    initial,
    dfinal,
    dscores,
    dx,  # (parts, rows, L, groups, K)
    dg,  # (blocks of K, rows, L, heads): what is owed to decays by what leaves the chunk, or else by what enters it
    scale,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    parts,
    per_part,
    per_block,
    other_b,
    other_strides,
    own_b,
    own_strides,
    x_b,
    x_strides,
    g_b,
    g_strides,
    step_b,
    step_strides,
    initial_strides,
    dfinal_strides,
    dx_b,
    dx_strides,
    dg_b,
    dg_strides,
    KEYS: tl.constexpr,  # dk, or else dq
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, last = chunk_of(table, PACKED)
    if length > 0:
        group, part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
        first_k = tl.program_id(2) * BLOCK_K
        slot = row * slots + token // CHUNK - 1
        t = tl.arange(0, CHUNK)
        gradient = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        in_group = heads // groups
        for nth in range(part, in_group, parts):
            head = group * in_group + nth
            entering = slot, document, first, head, heads, initial_strides
            leaving = slot + 1, document, last, head, heads, dfinal_strides
            carried = tl.zeros([CHUNK, BLOCK_K], tl.float32)  # from S do, or dS v
            through = tl.zeros([BLOCK_K], tl.float32)
            for first_v in range(0, V, BLOCK_V):
                values = load_tile(x, row, token, head, length, x_b, x_strides, first_v, V, CHUNK, BLOCK_V)
                state = load_between(kept, initial, entering, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
                if KEYS:
                    dstate = load_between(dkept, dfinal, leaving, first_k, first_v, K, V, WIDE_V, BLOCK_K, BLOCK_V)
                    through += tl.sum(state * dstate, 1)
                    state = dstate
                carried += dot_by_computed(values, tl.trans(state), PRECISION)
            if KEYS:
                if step is not None:
                    carried *= load_per_token(step, row, token, head, length, step_b, step_strides, CHUNK)[:, None]
            else:
                carried *= scale
            if g is not None:
                coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
                if KEYS:
                    carried *= to_end(coarse, fine, CHUNK)[:, None]
                else:
                    carried *= from_start(coarse, fine)[:, None]
                tile = load_tile(own, row, token, group, length, own_b, own_strides, first_k, K, CHUNK, BLOCK_K)
                owed = tl.sum(tile.to(tl.float32) * carried, 1)
                target = dg + tl.program_id(2) * per_block.to(tl.int64)
                if KEYS:
                    # What came before a token is summed from the left, not a whole less a part: strong decays make the
                    # parts as small as they like. So the sums up to a token are the next one's.
                    state_owed = tl.sum(through, 0) * whole(coarse, fine, CHUNK)
                    owed = tl.cumsum(owed, 0) + state_owed
                    store_per_token(target, state_owed, row, token, head, 1, dg_b, dg_strides, 1)
                    store_per_token(target, owed, row, token + 1, head, length - 1, dg_b, dg_strides, CHUNK)
                else:
                    owed = tl.cumsum(owed, 0, reverse=True)
                    store_per_token(target, owed, row, token, head, length, dg_b, dg_strides, CHUNK)
            pairs = dscores + (tl.program_id(0).to(tl.int64) * heads + head) * CHUNK * CHUNK
            for half in range(0, CHUNK, HALF):
                h, rest = half + tl.arange(0, HALF)[None, :], length - half
                weights = tl.load(pairs + (h * CHUNK + t[:, None] if KEYS else t[:, None] * CHUNK + h))
                factor = load_tile(
                    other, row, token + half, group, rest, other_b, other_strides, first_k, K, HALF, BLOCK_K
                )
                carried += dot_computed(weights, factor, PRECISION)
            gradient += carried  # a head's sum first, in however many parts heads are walked
        dx += part * per_part.to(tl.int64)
        store_tile(dx, gradient, row, token, group, length, dx_b, dx_strides, first_k, K, CHUNK, BLOCK_K)
