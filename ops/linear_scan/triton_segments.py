"""States from segment to segment of a row (``tritonsrc.segments``).

With more than one, a first walk finds each segment's summary (``ops/summary.py``): its state from zero, and its
transition, the product of its decays. ``pass_states`` then carries states from segment to segment, forward, or
gradients of states backward; a second walk starts from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.tritonsrc.launch import launch
from packc.ops.tritonsrc.tokens import (
    among,
)

_SEGMENTS_AT_ONCE = 16
_BLOCK_D = 32


@triton.jit(do_not_specialize=["L", "channels", "segment", "segments"])
def _pass_states(
    local,  # (rows, segments, D), as product and out
    product,
    document,
    out,
    L,
    channels,
    segment,
    segments,
    REVERSE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    document += row * L
    state = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.cdiv(segments, AT_ONCE)):
        # Loads first: none of them waits for the recurrence.
        lefts, decays, cuts = (), (), ()
        for k in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + k
            inside = nth < segments
            s = segments - 1 - nth if REVERSE else nth
            at = (row * segments + s) * channels
            lefts = lefts + (tl.load(local + at + d, among(d, channels, inside), 0.0),)
            decays = decays + (tl.load(product + at + d, among(d, channels, inside), 0.0),)
            # A state passes from the token in front to the segment's last, a gradient from the one behind to its first.
            left = s * segment - (0 if REVERSE else 1)
            right = tl.minimum(s * segment + segment, L) - (0 if REVERSE else 1)
            before = tl.load(document + left, inside & (left >= 0), -1)
            after = tl.load(document + right, inside & (right < L), -1)
            cuts = cuts + (before != after,)
        for k in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + k
            s = segments - 1 - nth if REVERSE else nth
            tl.store(out + (row * segments + s) * channels + d, state, among(d, channels, nth < segments))
            # The product of many decays above 1 may be inf, where token by token zero stays zero.
            passed = tl.where(cuts[k] | (state == 0), 0.0, decays[k] * state)
            state = passed + lefts[k]


def pass_states(local: Tensor, product: Tensor, document: Tensor, tokens: int, segment: int, reverse: bool) -> Tensor:
    """The state that enters every segment ``(rows, segments, D)`` (reverse: the gradient, from the right).

    Args:
        local: ``(rows, segments, D)``: what leaves a segment that zeros enter.
        product: ``(rows, segments, D)``, of its decays.
        document: the document of every token ``(rows * tokens,)``; what enters a document's own segments only passes
            through those that hold nothing else.
        tokens: L of a row.
        segment: tokens of a segment.
        reverse: from the last segment to the first.
    """
    rows, segments, channels = local.shape
    out = torch.empty_like(local)
    launch(
        _pass_states,
        (triton.cdiv(channels, _BLOCK_D), rows),
        local=local,
        product=product,
        document=document,
        out=out,
        L=tokens,
        channels=channels,
        segment=segment,
        segments=segments,
        REVERSE=reverse,
        AT_ONCE=_SEGMENTS_AT_ONCE,
        BLOCK_D=_BLOCK_D,
        num_warps=1,
    )
    return out
