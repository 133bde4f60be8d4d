"""The states at both ends of every document: the last inputs, and the gradient of the first ones.

One program takes one document and a block of channels; ``slot`` counts the W - 1 rows of a state, oldest first. With a
document's history before it, row i of that and token i - (W - 1) are the same: the last W - 1 rows are the final state.
"""

import triton
import triton.language as tl

from packc.ops.tritonsrc.activations import silu_slope


@triton.jit
def _document(cu_seqlens, n, L):
    """Batch row, first token and length of a document."""
    row = n.to(tl.int64)
    begin = row * 0
    length = n * 0 + L
    if cu_seqlens is not None:
        row = row * 0
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - begin).to(tl.int32)
    return row, begin, length


_VARYING = ["L", "x_row", "state_strides"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["x_channel"])
def final_states(
    x,
    cu_seqlens,
    initial_state,
    final_state,
    L,
    D,
    x_row,
    x_token,
    x_channel,
    state_strides,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // blocks
    row, begin, length = _document(cu_seqlens, n, L)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    mask = (channel < D) & (slot < W - 1)
    position = length - (W - 1) + slot
    at = x + row * x_row + (begin + position) * x_token + channel * x_channel
    value = tl.load(at, mask=mask & (position >= 0), other=0).to(tl.float32)
    if initial_state is not None:
        held = initial_state + n.to(tl.int64) * state_strides[0] + channel * state_strides[1]
        held += (length + slot).to(tl.int64) * state_strides[2]
        older = position < 0
        value = tl.where(older, tl.load(held, mask=mask & older, other=0).to(tl.float32), value)
    tl.store(final_state + (n.to(tl.int64) * D + channel) * (W - 1) + slot, value, mask=mask)


@triton.jit(
    do_not_specialize=[*_VARYING, "dout_row", "final_strides"],
    do_not_specialize_on_alignment=["x_channel", "dout_channel"],
)
def initial_state_grads(
    dout,
    dfinal_state,
    x,
    weight,
    bias,
    cu_seqlens,
    initial_state,
    dinitial_state,
    L,
    D,
    dout_row,
    dout_token,
    dout_channel,
    x_row,
    x_token,
    x_channel,
    weight_strides,
    bias_strides,
    state_strides,
    final_strides,
    W: tl.constexpr,
    SILU: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    n = tl.program_id(0) // blocks
    row, begin, length = _document(cu_seqlens, n, L)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    channels = channel < D
    slot = tl.arange(0, SLOTS)
    mask = channels[:, None] & (slot < W - 1)[None, :]
    inputs = x + row * x_row + begin * x_token + channel * x_channel
    grads = dout + row * dout_row + begin * dout_token + channel * dout_channel
    states = initial_state + n.to(tl.int64) * state_strides[0] + channel * state_strides[1]
    filters = weight + channel * weight_strides[0]

    # The interpreter's loops count in Python: added to a tensor, its numbers become tensors of 64 bits.
    zero = n.to(tl.int64) * 0
    total = tl.zeros([BLOCK_D, SLOTS], tl.float32)
    # Only a document's first W - 1 tokens see its initial state.
    for position in tl.range(0, tl.minimum(length, W - 1)):
        grad = tl.load(grads + (zero + position) * dout_token, mask=channels, other=0).to(tl.float32)
        if SILU:
            pre = tl.zeros([BLOCK_D], tl.float32)
            if bias is not None:
                pre = tl.load(bias + channel * bias_strides[0], mask=channels, other=0).to(tl.float32)
            for k in tl.range(0, W):
                token = channel * 0 + (position + k - (W - 1))
                old = tl.load(states + (token + W - 1) * state_strides[2], mask=channels & (token < 0), other=0).to(
                    tl.float32
                )
                new = tl.load(inputs + token * x_token, mask=channels & (token >= 0), other=0).to(tl.float32)
                tap = tl.load(filters + (zero + k) * weight_strides[1], mask=channels, other=0).to(tl.float32)
                pre = tl.fma(tap, tl.where(token < 0, old, new), pre)
            grad *= silu_slope(pre)
        met = mask & (slot >= position)[None, :]
        at = filters[:, None] + (slot - position).to(tl.int64)[None, :] * weight_strides[1]
        tap = tl.load(at, mask=met, other=0).to(tl.float32)
        total = tl.where(met, tl.fma(tap, grad[:, None], total), total)
    if dfinal_state is not None:
        # A document shorter than a state hands part of its initial state on.
        final = slot - length
        at = dfinal_state + n.to(tl.int64) * final_strides[0] + channel[:, None] * final_strides[1]
        at += final.to(tl.int64)[None, :] * final_strides[2]
        total += tl.load(at, mask=mask & (final >= 0)[None, :], other=0).to(tl.float32)
    at = dinitial_state + (n.to(tl.int64) * D + channel)[:, None] * (W - 1) + slot[None, :]
    tl.store(at, total.to(dinitial_state.dtype.element_ty), mask=mask)
