"""States from segment to segment of a row (``tritonsrc.segments``).

With more than one, a first walk finds each segment's summary (``ops/summary.py``): its state from zero, and its
transition, the sum of its step sizes. ``pass_states`` then carries states from segment to segment, forward, or
gradients of states backward; a second walk starts from them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packc.ops.tritonsrc.launch import launch
from packc.ops.tritonsrc.tokens import among

_SEGMENTS_AT_ONCE = 16


@triton.jit(do_not_specialize=["L", "segment", "segments", "out_row", "out_segment"])
def _pass_states(
    local,  # (rows, segments, N, D)
    total,  # (rows, segments, D)
    A,  # (N, D), in base 2
    document,
    out,  # row and segment strides given; (N, D) within
    L,
    channels,
    states,
    segment,
    segments,
    out_row,
    out_segment,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < channels
    rate = tl.load(A + n * channels + d, in_d, 0.0)
    out += row * out_row + n * channels + d
    # What enters the first segment is there already.
    first = segments - 1 if REVERSE else 0
    state = tl.load(out + tl.cast(first, tl.int64) * out_segment, in_d, 0.0)
    for i in range(tl.cdiv(segments - 1, AT_ONCE)):
        # Loads first: none of them waits for the recurrence.
        lefts, decays, cuts = (), (), ()
        for k in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + k
            inside = nth < segments - 1
            s = (segments - 1 - nth if REVERSE else nth).to(tl.int64)
            at = row * segments + s
            lefts = lefts + (tl.load(local + (at * states + n) * channels + d, among(d, channels, inside), 0.0),)
            time = tl.load(total + at * channels + d, among(d, channels, inside), 0.0)
            decays = decays + (tl.exp2(time * rate),)
            if PACKED:
                # What enters leaves if one document holds the token in front of the segment and all of its own; a
                # gradient comes from behind, and there the document must hold the token behind the segment.
                begin = s * segment
                end = tl.minimum(begin + segment, L)
                if REVERSE:
                    source = tl.load(document + end, inside & (end < L), -1)
                    target = tl.load(document + begin, inside, -1)
                else:
                    source = tl.load(document + begin - 1, inside & (begin > 0), -1)
                    target = tl.load(document + end - 1, inside, -1)
                cuts = cuts + (source != target,)
        for k in tl.static_range(AT_ONCE):
            nth = i * AT_ONCE + k
            s = (segments - 1 - nth if REVERSE else nth).to(tl.int64)
            passed = decays[k] * state
            if PACKED:
                passed = tl.where(cuts[k], 0.0, passed)
            state = passed + lefts[k]
            following = s - 1 if REVERSE else s + 1
            tl.store(out + following * out_segment, state, among(d, channels, nth < segments - 1))


def pass_states(
    local: Tensor,
    total: Tensor,
    A: Tensor,
    document: Tensor | None,
    out: Tensor,
    tokens: int,
    segment: int,
    reverse: bool,
) -> None:
    """From each segment's own end state to the state that enters every segment (reverse: gradients, from the right).

    Args:
        local: ``(rows, segments, N, D)``: what leaves a segment that zeros enter.
        total: ``(rows, segments, D)``: the sum of its step sizes.
        A: ``(N, D)``, times log2(e).
        document: the document of every token, or None; what enters a segment in which one begins does not leave it.
        out: ``(rows, segments, N, D)``, its first (reverse: last) segment filled in; the others are written.
        tokens: L of a row.
        segment: tokens of a segment.
        reverse: from the last segment to the first.
    """
    rows, segments, states, channels = local.shape
    launch(
        _pass_states,
        (triton.cdiv(channels, 32), states, rows),
        local=local,
        total=total,
        A=A,
        document=document,
        out=out,
        L=tokens,
        channels=channels,
        states=states,
        segment=segment,
        segments=segments,
        out_row=out.stride(0),
        out_segment=out.stride(1),
        REVERSE=reverse,
        PACKED=document is not None,
        AT_ONCE=_SEGMENTS_AT_ONCE,
        BLOCK_D=32,
        num_warps=1,
    )
