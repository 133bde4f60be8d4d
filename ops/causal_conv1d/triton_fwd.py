"""The forward of narrow filters."""

# Tuples grow here as loops are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from packc.ops.causal_conv1d.triton_tile import load_filter, load_walk, spans, tap, within_one_document
from packc.ops.tritonsrc.activations import silu


@triton.jit
def _tile(
    inputs,
    taps,
    offset,
    cu_seqlens,
    documents,
    outputs,
    row,
    token,
    channels,
    L,
    state_strides,
    states,
    D: tl.constexpr,
    X_STEP: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    CLEAN: tl.constexpr,
):
    loaded = load_walk(inputs, token, L, channels, X_STEP, W - 1, STEPS, CLEAN)
    if not CLEAN:
        found = spans(cu_seqlens, documents, token, L, STEPS)
    wide = ()
    for i in tl.static_range(W - 1):
        wide += (loaded[i].to(tl.float32),)
    for s in tl.static_range(STEPS):
        now = token + s
        wide += (loaded[W - 1 + s].to(tl.float32),)
        pre = offset
        for k in tl.static_range(W):
            x = wide[s + k]
            if not CLEAN and k < W - 1:
                document, begin, _ = found[s]
                x = tap(x, W - 1 - k, now - begin, row, document, states, channels, now < L, state_strides, W)
            pre = tl.fma(taps[k], x, pre)
        mask = channels[None, :]
        if not CLEAN:
            mask = mask & (now < L)[:, None]
        out = silu(pre) if SILU else pre
        tl.store(outputs + s * D, out.to(outputs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "x_row"], do_not_specialize_on_alignment=["x_channel"])
def forward(
    x,
    weight,
    bias,
    cu_seqlens,
    documents,
    initial_state,
    out,
    L,
    x_row,
    x_channel,
    weight_strides,
    bias_strides,
    state_strides,
    D: tl.constexpr,
    X_STEP: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    tiles = tl.cdiv(L, ROWS * STEPS)
    unit = tl.program_id(0) // blocks
    row = unit // tiles
    first = unit % tiles * ROWS * STEPS
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = channel < D
    token = first + tl.arange(0, ROWS) * STEPS

    taps, offset = load_filter(weight, bias, channel, channels, weight_strides, bias_strides, W)
    start = row.to(tl.int64) * x_row
    if X_ALIGNED:
        start = tl.multiple_of(start, 16)
    inputs = x + start + token.to(tl.int64)[:, None] * X_STEP + channel.to(tl.int64)[None, :] * x_channel
    outputs = out + (row.to(tl.int64) * L + token)[:, None] * D + channel[None, :]
    states = None
    if initial_state is not None:
        states = initial_state + channel.to(tl.int64) * state_strides[1]
    tile = inputs, taps, offset, cu_seqlens, documents, outputs, row, token, channels, L, state_strides
    if within_one_document(cu_seqlens, documents, first, W - 1, ROWS * STEPS, L):
        _tile(*tile, states, D, X_STEP, W, SILU, STEPS, True)
    else:
        _tile(*tile, states, D, X_STEP, W, SILU, STEPS, False)
