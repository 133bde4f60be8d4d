"""The states between chunks on Triton, and their gradients: what each chunk adds, then carried along every document.

Chunks add in parallel, each into the slot of the state that it leads to; a second kernel then turns what was added into
what is there, chunk by chunk: the only part that is sequential, a few operations for each value of a state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.triton_chunks import (
    Chunks,
    chunk_of,
    load_per_token,
    load_tile,
    shared_arguments,
    slots_behind,
    state_strides,
    token_strides,
)
from packc.ops.common.triton_products import (
    dot_by_computed,
    from_start,
    log_decays,
    to_end,
    whole,
)
from packc.ops.tritonsrc.launch import autotuned, launch, taken

# Of kernels that make (64, 64) results.
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (4, 8)]
# There warps beyond four compute what others do. All registers there are: ptxas takes fewer of its own accord, for the
# sake of more warps, and spills.
BEFORE_HOPPER = [triton.Config({}, num_warps=4, num_stages=1, maxnreg=255)]
_AT_ONCE = 8
_BLOCK = 512


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["K", "V"])
@triton.jit(do_not_specialize=["slots", "x_b", "y_b", "g_b", "step_b"])
def _add(
    x,  # k, or q
    y,  # v, or the gradient of out
    g,
    step,
    table,
    kept,  # (rows, slots, heads, K, WIDE_V)
    ends,  # (documents, heads, K, V): final states, or gradients of initial ones; or None
    decays,  # (chunks, heads): of a whole chunk
    scale,
    heads,
    groups,
    slots,
    K,
    V,
    WIDE_V,
    x_b,
    x_strides,
    y_b,
    y_strides,
    g_b,
    g_strides,
    step_b,
    step_strides,
    ends_strides,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, document, token, length, first, last = chunk_of(table, PACKED)
    head = tl.program_id(1).to(tl.int64)
    blocks_v = tl.cdiv(V, BLOCK_V)
    first_k, first_v = tl.program_id(2) // blocks_v * BLOCK_K, tl.program_id(2) % blocks_v * BLOCK_V
    leads_out = first if REVERSE else last
    needed = length > 0
    if ends is None:
        needed = needed & (leads_out == 0)
    if needed:
        weight = tl.zeros([CHUNK], tl.float32) + scale
        if g is not None:
            coarse, fine = log_decays(load_per_token(g, row, token, head, length, g_b, g_strides, CHUNK))
            weight *= from_start(coarse, fine) if REVERSE else to_end(coarse, fine, CHUNK)
            if tl.program_id(2) == 0:
                at = tl.program_id(0).to(tl.int64) * heads + head
                tl.store(decays + at, whole(coarse, fine, CHUNK))
        group = head // (heads // groups)
        right = load_tile(y, row, token, head, length, y_b, y_strides, first_v, V, CHUNK, BLOCK_V)
        right = right.to(tl.float32)
        if step is not None:
            right *= load_per_token(step, row, token, head, length, step_b, step_strides, CHUNK)[:, None]
        right *= weight[:, None]
        left = load_tile(x, row, token, group, length, x_b, x_strides, first_k, K, CHUNK, BLOCK_K)
        added = dot_by_computed(tl.trans(left), right, PRECISION)
        k, v = first_k + tl.arange(0, BLOCK_K), first_v + tl.arange(0, BLOCK_V)
        inside = (k < K)[:, None] & (v < V)[None, :]
        if leads_out:
            if ends is not None:
                ends_n, ends_h, ends_k, ends_v = ends_strides
                ends += document * ends_n + head * ends_h
                tl.store(ends + ((k * ends_k)[:, None] + (v * ends_v)[None, :]), added, inside)
        else:
            slot = row * slots + token // CHUNK - (1 if REVERSE else 0)
            kept += (slot * heads + head) * K * WIDE_V
            tl.store(kept + ((k * WIDE_V)[:, None] + v[None, :]), added, inside)


@triton.jit(do_not_specialize=["slots"])
def _carry(
    kept,
    begins,  # (documents, heads, K, V): initial states, or gradients of final ones; or None
    ends,
    decays,
    starts,
    first_chunk,
    heads,
    slots,
    K,
    V,
    WIDE_V,
    begins_strides,
    ends_strides,
    DECAYS: tl.constexpr,
    PADDED: tl.constexpr,  # rows of V: nothing was written there
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    document, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    k, v = e // WIDE_V, e % WIDE_V
    inside = (k < K) & (v < V)
    base = tl.load(first_chunk + document)
    count = tl.load(first_chunk + document + 1) - base
    state = tl.zeros([BLOCK], tl.float32)
    if begins is not None:
        begins_n, begins_h, begins_k, begins_v = begins_strides
        at = document * begins_n + head * begins_h + k * begins_k + v * begins_v
        state = tl.load(begins + at, inside, 0.0).to(tl.float32)
    # A document's slots lie one after the other.
    slot = tl.load(starts + document) // CHUNK if PACKED else document * slots
    unused = kept + ((0 if PACKED else document * slots) * heads + head) * K * WIDE_V + e
    kept += (slot.to(tl.int64) * heads + head) * K * WIDE_V + e
    decays += base.to(tl.int64) * heads + head
    stride = tl.cast(heads, tl.int64) * K * WIDE_V
    for i in range(tl.cdiv(count - 1, AT_ONCE)):
        # Loads first: none of them waits for the recurrence.
        added, left = (), ()
        for r in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + r
            there = nth < count - 1
            nth_slot = (count - 2 - nth if REVERSE else nth).to(tl.int64)
            added = added + (tl.load(kept + nth_slot * stride, e < tl.where(there, K * WIDE_V, 0), 0.0),)
            if DECAYS:
                left = left + (tl.load(decays + (nth_slot + 1 if REVERSE else nth_slot) * heads, there, 1.0),)
            else:
                left = left + (1.0,)
        for r in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + r
            nth_slot = (count - 2 - nth if REVERSE else nth).to(tl.int64)
            state = left[r] * state + added[r]
            if PADDED:
                state = tl.where(inside, state, 0.0)
            tl.store(kept + nth_slot * stride, state, e < tl.where(nth < count - 1, K * WIDE_V, 0))
    if not REVERSE:
        # What the forward keeps is compared as a whole by those who test it.
        begin, end = slots_behind(starts, document, count, slots, PACKED, CHUNK)
        for nth in range(begin, end):
            tl.store(unused + nth * stride, tl.zeros([BLOCK], tl.float32), e < K * WIDE_V)
    if ends is not None:
        ends_n, ends_h, ends_k, ends_v = ends_strides
        ends += document * ends_n + head * ends_h + k * ends_k + v * ends_v
        if count > 0:
            if DECAYS:
                state *= tl.load(decays + (0 if REVERSE else (count - 1).to(tl.int64)) * heads)
            state += tl.load(ends, inside, 0.0)
        tl.store(ends, state, inside)


def carry_states(
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    scale: float,
    chunks: Chunks,
    begins: Tensor | None,
    ends: Tensor | None,
    kept: Tensor,
    reverse: bool,
) -> None:
    """Fills ``kept`` with the states between chunks and ``ends`` with those behind documents.

    Args:
        x, y: ``(B, L, G, K)`` and ``(B, L, H, V)``: k and v; or, for gradients from the right, q and that of out.
        g, step: fp32 ``(B, L, H)`` or None.
        scale: of all that chunks add.
        chunks: the documents'.
        begins: ``(documents, H, K, V)``, any strides: what each document begins with; None for zeros.
        ends: fp32 ``(documents, H, K, V)``, any strides, or None.
        kept: fp32 ``chunk_states_shape``.
        reverse: whether from the last chunk to the first: then ``begins`` is behind the documents, ``ends`` in front.
    """
    heads, K, V, wide_V = y.shape[2], x.shape[3], y.shape[3], kept.shape[4]
    decays = kept.new_empty((chunks.bound, heads)) if g is not None else kept
    shared = {
        "ends": ends,
        "decays": decays,
        "slots": kept.shape[1],
        "V": V,
        "WIDE_V": wide_V,
        "REVERSE": reverse,
        **shared_arguments(x, y, chunks),
        **state_strides(ends=ends),
    }
    block_k, block_v = block_of(K, x.dtype), block_of(V, x.dtype)
    launch(
        _add,
        (chunks.bound, heads, triton.cdiv(K, block_k) * triton.cdiv(V, block_v)),
        x=x,
        y=y,
        g=g,
        step=step,
        kept=kept,
        scale=float(scale),
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        **token_strides(x=x, y=y, g=g, step=step),
        **taken(_add, shared),
    )
    launch(
        _carry,
        (chunks.documents, heads, triton.cdiv(K * wide_V, _BLOCK)),
        kept=kept,
        begins=begins,
        starts=chunks.starts,
        first_chunk=chunks.first,
        DECAYS=g is not None,
        PADDED=wide_V != V,
        AT_ONCE=_AT_ONCE,
        BLOCK=_BLOCK,
        num_warps=4,
        **state_strides(begins=begins),
        **taken(_carry, shared),
    )


def block_of(channels: int, dtype: torch.dtype) -> int:
    """Channels of a tile: a power of two that tensor cores take, as many as stay in registers."""
    return min(64 if dtype == torch.bfloat16 else 32, max(16, triton.next_power_of_2(channels)))


def half_block_of(channels: int, dtype: torch.dtype) -> int:
    """For kernels that have other tiles beside it."""
    return min(block_of(channels, dtype), 32 if dtype == torch.bfloat16 else 16)
