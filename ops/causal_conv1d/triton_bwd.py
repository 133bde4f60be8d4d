"""The backward of narrow filters: the input's gradient, and partial sums of the parameters'."""

# Tuples grow here as loops are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from packc.ops.causal_conv1d.triton_tile import load_filter, load_walk, spans, tap, within_one_document
from packc.ops.tritonsrc.activations import silu_slope


@triton.jit
def _tile(
    inputs,
    grads,
    taps,
    offset,
    cu_seqlens,
    documents,
    outputs,
    sums,
    row,
    token,
    channels,
    L,
    state_strides,
    final_strides,
    states,
    final_grads,
    D: tl.constexpr,
    X_STEP: tl.constexpr,
    DOUT_STEP: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CLEAN: tl.constexpr,
):
    # A token's gradient needs those of the W - 1 pre-activations behind it: a walk goes on that far.
    WALK: tl.constexpr = STEPS + W - 1
    loaded = load_walk(inputs, token, L, channels, X_STEP, W - 1, WALK, CLEAN)
    loaded_grads = load_walk(grads, token, L, channels, DOUT_STEP, 0, WALK, CLEAN)
    if not CLEAN:
        found = spans(cu_seqlens, documents, token, L, WALK)
    wide = ()
    for i in tl.static_range(W - 1):
        wide += (loaded[i].to(tl.float32),)
    dpre = ()
    for s in tl.static_range(WALK):
        now = token + s
        live = (now < L)[:, None]
        wide += (loaded[W - 1 + s].to(tl.float32),)
        window = ()
        pre = offset
        for k in tl.static_range(W):
            x = wide[s + k]
            if not CLEAN and k < W - 1:
                document, begin, _ = found[s]
                x = tap(x, W - 1 - k, now - begin, row, document, states, channels, now < L, state_strides, W)
            pre = tl.fma(taps[k], x, pre)
            window += (x,)
        grad = loaded_grads[s].to(tl.float32)
        if SILU:
            grad *= silu_slope(pre)
        dpre += (grad,)

        if s < STEPS:
            added = ()
            for k in tl.static_range(W):
                total = tl.fma(grad, window[k], sums[k])
                added += (total if CLEAN else tl.where(live, total, sums[k]),)
            total = sums[W] + grad
            added += (total if CLEAN else tl.where(live, total, sums[W]),)
            sums = added

        if s >= W - 1:
            at = token + (s - (W - 1))
            dx = tl.zeros(grad.shape, tl.float32)
            mask = channels[None, :]
            if not CLEAN:
                document, _, end = found[s - (W - 1)]
                mask = mask & (at < L)[:, None]
            for j in tl.static_range(W):
                total = tl.fma(taps[W - 1 - j], dpre[s - (W - 1) + j], dx)
                dx = total if CLEAN else tl.where((at + j < end)[:, None], total, dx)
            if not CLEAN and final_grads is not None:
                slot = W - 1 - (end - at)
                place = (row + document).to(tl.int64) * final_strides[0] + slot.to(tl.int64) * final_strides[2]
                kept = (slot >= 0)[:, None] & mask
                dx += tl.load(final_grads[None, :] + place[:, None], mask=kept, other=0).to(tl.float32)
            tl.store(outputs + (s - (W - 1)) * D, dx.to(outputs.dtype.element_ty), mask=mask)
    return sums


@triton.jit(
    do_not_specialize=["L", "x_row", "dout_row"],
    do_not_specialize_on_alignment=["x_channel", "dout_channel"],
)
def backward(
    dout,
    dfinal_state,
    x,
    weight,
    bias,
    cu_seqlens,
    documents,
    initial_state,
    dx,
    partial,
    L,
    dout_row,
    dout_channel,
    x_row,
    x_channel,
    weight_strides,
    bias_strides,
    state_strides,
    final_strides,
    D: tl.constexpr,
    X_STEP: tl.constexpr,
    DOUT_STEP: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    DOUT_ALIGNED: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``partial (chunks of all rows, W + 1, D)``: sums over a chunk for each tap, then the bias."""
    blocks = tl.cdiv(D, BLOCK_D)
    chunks = tl.cdiv(L, CHUNK)
    unit = tl.program_id(0) // blocks
    row = unit // chunks
    chunk = unit % chunks * CHUNK
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = channel < D

    taps, offset = load_filter(weight, bias, channel, channels, weight_strides, bias_strides, W)
    start = row.to(tl.int64) * x_row
    grad_start = row.to(tl.int64) * dout_row
    if X_ALIGNED:
        start = tl.multiple_of(start, 16)
    if DOUT_ALIGNED:
        grad_start = tl.multiple_of(grad_start, 16)
    states = None
    if initial_state is not None:
        states = initial_state + channel.to(tl.int64) * state_strides[1]
    final_grads = None
    if dfinal_state is not None:
        final_grads = dfinal_state + channel.to(tl.int64) * final_strides[1]

    sums = ()
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros([ROWS, BLOCK_D], tl.float32),)
    for first in tl.range(chunk, tl.minimum(chunk + CHUNK, L), ROWS * STEPS):
        token = first + tl.arange(0, ROWS) * STEPS
        inputs = x + start + token.to(tl.int64)[:, None] * X_STEP + channel.to(tl.int64)[None, :] * x_channel
        grads = (
            dout + grad_start + token.to(tl.int64)[:, None] * DOUT_STEP + channel.to(tl.int64)[None, :] * dout_channel
        )
        outputs = dx + (row.to(tl.int64) * L + token)[:, None] * D + channel[None, :]
        tile = inputs, grads, taps, offset, cu_seqlens, documents, outputs, sums, row, token, channels, L
        if within_one_document(cu_seqlens, documents, first, W - 1, ROWS * STEPS + W - 1, L):
            sums = _tile(
                *tile, state_strides, final_strides, states, final_grads, D, X_STEP, DOUT_STEP, W, SILU, STEPS, True
            )
        else:
            sums = _tile(
                *tile, state_strides, final_strides, states, final_grads, D, X_STEP, DOUT_STEP, W, SILU, STEPS, False
            )
    for k in tl.static_range(W + 1):
        at = partial + (unit.to(tl.int64) * (W + 1) + k) * D + channel
        tl.store(at, tl.sum(sums[k], 0), mask=channels)


@triton.jit(do_not_specialize=["units"])
def sum_partials(
    partial, dweight, dbias, units, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The parameters' gradients, always added in the same order."""
    k = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = channel < D
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first in tl.range(0, units, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        at = partial + (unit.to(tl.int64) * (W + 1) + k)[:, None] * D + channel[None, :]
        total += tl.load(at, mask=(unit < units)[:, None] & channels[None, :], other=0)
    total = tl.sum(total, 0)
    if k < W:
        tl.store(dweight + channel.to(tl.int64) * W + k, total.to(dweight.dtype.element_ty), mask=channels)
    elif dbias is not None:
        tl.store(dbias + channel, total.to(dbias.dtype.element_ty), mask=channels)
