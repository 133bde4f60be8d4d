"""What the convolution's Triton kernels share: the documents of a tile's tokens, and the inputs that taps meet.

A tile is ROWS x BLOCK_D: every row of it walks STEPS consecutive tokens with the last W inputs in registers, so that
each is loaded and widened once. Tokens count from the start of their batch row, in int32; whatever is multiplied by a
stride is int64.
"""

# Tuples grow here as loops are unrolled.
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl


@triton.jit
def span(cu_seqlens, documents, token, L):
    """The document of each token, and the tokens ``[begin, end)`` of it; tokens beyond the row have any."""
    document = token * 0
    begin = token * 0
    end = token * 0 + L
    if cu_seqlens is not None:
        document = tl.load(documents + token, mask=(token >= 0) & (token < L), other=0)
        begin = tl.maximum(tl.load(cu_seqlens + document).to(tl.int32), 0)
        end = tl.minimum(tl.load(cu_seqlens + document + 1).to(tl.int32), L)
    return document, begin, end


@triton.jit
def within_one_document(cu_seqlens, documents, first, before, tokens, L):
    """Whether all of ``[first - before, first + tokens)`` is one document: such a tile needs no masks."""
    _, begin, end = span(cu_seqlens, documents, first, L)
    return (first - before >= begin) & (first + tokens <= end)


@triton.jit
def load_walk(
    pointers, token, L, channels, STEP: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, CLEAN: tl.constexpr
):
    """Tokens ``[token - BEFORE, token + AFTER)``, zero where there is none.

    All at once: behind a store no load is moved up, and one load at a time does not keep the memory busy. They stay in
    their own dtype until they are used, which halves the registers of those that wait. STEP, the stride of tokens, is a
    constant of the model: as one it is part of the loads, where a variable's multiples would fill the registers.
    """
    loaded = ()
    for i in tl.static_range(BEFORE + AFTER):
        mask = channels[None, :]
        if not CLEAN:
            now = token + (i - BEFORE)
            mask = mask & ((now >= 0) & (now < L))[:, None]
        loaded += (tl.load(pointers + (i - BEFORE) * STEP, mask=mask, other=0),)
    return loaded


@triton.jit
def spans(cu_seqlens, documents, token, L, STEPS: tl.constexpr):
    """:func:`span` of each step's tokens."""
    found = ()
    for s in tl.static_range(STEPS):
        found += (span(cu_seqlens, documents, token + s, L),)
    return found


@triton.jit
def tap(loaded, shift, position, row, document, states, channels, live, strides, W: tl.constexpr):
    """The input ``shift`` tokens before each token: ``loaded``, or what the document began with.

    ``states`` points to the channels of the first initial state, of these ``strides``, or is None.
    """
    outside = position < shift
    held = 0.0
    if states is not None:
        place = (row + document).to(tl.int64) * strides[0] + (W - 1 + position - shift).to(tl.int64) * strides[2]
        mask = (outside & live)[:, None] & channels[None, :]
        held = tl.load(states[None, :] + place[:, None], mask=mask, other=0).to(tl.float32)
    # A select: what lies in another document may be NaN.
    return tl.where(outside[:, None], held, loaded)


@triton.jit
def load_filter(weight, bias, channel, channels, weight_strides, bias_strides, W: tl.constexpr):
    """The taps as a tuple of W rows, and the bias, in fp32."""
    place = channel.to(tl.int64)
    offset = tl.zeros(channel.shape, tl.float32)
    if bias is not None:
        offset = tl.load(bias + place * bias_strides[0], mask=channels, other=0).to(tl.float32)
    taps = ()
    for k in tl.static_range(W):
        at = weight + place * weight_strides[0] + k * weight_strides[1]
        taps += (tl.load(at, mask=channels, other=0).to(tl.float32)[None, :],)
    return taps, offset[None, :]
