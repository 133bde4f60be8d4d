"""The linear scan's forward on Triton: programs walk a segment of a row for a block of channels, chunk by tile.

A tile's tokens are a tuple of vectors over channels: their loads do not wait for each other, and the recurrence is a
chain of FMAs within a thread. Batch rows are documents like any others, so that one kernel serves both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops import documents
from packc.ops.linear_scan.reference import CHUNK
from packc.ops.linear_scan.triton_segments import pass_states
from packc.ops.tritonsrc.documents import document_of_token
from packc.ops.tritonsrc.launch import autotuned, launch
from packc.ops.tritonsrc.segments import segment_tokens
from packc.ops.tritonsrc.tokens import (
    among,
    at_token,
    channels_of,
    countable,
    documents_of,
    enter,
    load_tokens,
    store_own,
    store_token,
    strides,
    wide,
)

BLOCK_D = 128  # channels of a program
NOT_SPECIALIZED = ["L", "segment", "segments", "a_b", "b_b", "dout_b"]
APART = ["a_d", "b_d", "dout_d"]  # channels lie a length apart, if they are not neighbours
CONFIGS = [triton.Config({"BLOCK_T": 8}, num_warps=1), triton.Config({"BLOCK_T": 16}, num_warps=2)]


@triton.jit
def place(channels, segments, BLOCK_D: tl.constexpr):
    """Row, segment and first channel of this program. Neighbours read neighbouring channels of the same tokens."""
    blocks = tl.cdiv(channels, BLOCK_D)
    stretch = tl.program_id(0) // blocks
    return (stretch // segments).to(tl.int64), stretch % segments, tl.program_id(0) % blocks * BLOCK_D


@triton.jit
def load_decays(pointers, a_t, token, d, channels, L, BLOCK_T: tl.constexpr):
    """A tile in fp32; ones behind the row's end, which leave a state as it is."""
    decays = ()
    for r in tl.static_range(BLOCK_T):
        decays = decays + (tl.load(pointers + r * a_t, among(d, channels, token + r < L), 1.0).to(tl.float32),)
    return decays


@autotuned(CONFIGS, key=["channels", "OUTPUT"])
@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=APART)
def walk(
    a,
    b,
    document,
    initial_state,  # (documents, D), as final_state
    entering,  # (rows, segments, D)
    out,  # (rows, L, D)
    final_state,
    chunk_states,  # (rows, L // CHUNK, D)
    local,  # (rows, segments, D), as product
    product,
    L,
    channels,
    segment,
    segments,
    a_b,
    a_t,
    a_d,
    b_b,
    b_t,
    b_d,
    OUTPUT: tl.constexpr,  # or only local and product
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, at, first = place(channels, segments, BLOCK_D)
    d = channels_of(first, WIDE, BLOCK_D)
    in_d = d < channels
    document += row * L
    segment_of = (row * segments + at) * channels
    h = tl.zeros([BLOCK_D], tl.float32)
    if entering is not None:
        h = tl.load(entering + segment_of + d, in_d, 0.0)
    decay = tl.full([BLOCK_D], 1.0, tl.float32)
    begin = at * segment
    for i in range(tl.cdiv(tl.minimum(segment, L - begin), BLOCK_T)):
        token = begin + i * BLOCK_T
        decays = load_decays(at_token(a, row, token, d, a_b, a_t, a_d), a_t, token, d, channels, L, BLOCK_T)
        inputs = load_tokens(at_token(b, row, token, d, b_b, b_t, b_d), b_t, token, d, channels, L, BLOCK_T)
        of = documents_of(document, token, L, True, BLOCK_T)
        if OUTPUT:
            out_at = at_token(out, row, token, d, L, channels, 1)
        for r in tl.static_range(BLOCK_T):
            h = enter(h, of, r, initial_state, d, channels, 0, channels, 1, True)
            h = decays[r] * h + inputs[r]
            if OUTPUT:
                store_token(out_at + r * channels, h, d, channels, token + r < L)
                if final_state is not None:
                    if of[r + 1] != of[r + 2]:
                        store_own(final_state, h, of[r + 1], d, channels, 0, channels, 1)
            else:
                decay *= decays[r]
        if OUTPUT:
            behind = token + BLOCK_T
            kept = chunk_states + (row * (L // CHUNK) + behind // CHUNK - 1) * channels + d
            tl.store(kept, h, among(d, channels, (behind % CHUNK == 0) & (behind <= L)))
    if not OUTPUT:
        tl.store(local + segment_of + d, h, in_d)
        tl.store(product + segment_of + d, decay, in_d)


class Problem:
    """What forward and backward prepare alike."""

    def __init__(self, b: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor) -> None:
        self.rows, self.tokens, self.channels = b.shape
        blocks = triton.cdiv(self.channels, BLOCK_D)
        self.segment = segment_tokens(self.rows, self.tokens, blocks, 4 * CHUNK, b.device)
        self.segments = triton.cdiv(self.tokens, self.segment)
        offsets = documents.offsets(None, b) if cu_seqlens is None else cu_seqlens
        self.document = document_of_token(offsets, self.rows * self.tokens)
        self.grid = (self.rows * self.segments * blocks,)
        self.shared: dict[str, Any] = {
            "document": self.document,
            "L": self.tokens,
            "channels": self.channels,
            "segment": self.segment,
            "segments": self.segments,
            "WIDE": wide(b, *tensors),
            "BLOCK_D": BLOCK_D,
        }

    def of_segments(self, x: Tensor) -> Tensor:
        return x.new_empty((self.rows, self.segments, self.channels), dtype=torch.float32)

    def enter_segments(self, local: Tensor, product: Tensor, reverse: bool) -> Tensor:
        return pass_states(local, product, self.document, self.tokens, self.segment, reverse)


def states_of_empty_documents(b: Tensor, cu_seqlens: Tensor | None, state: Tensor | None) -> Tensor:
    """``(documents, D)``, fp32, as if all documents were empty: what enters them leaves them."""
    if state is not None:
        return state.clone()
    return b.new_zeros((documents.count(cu_seqlens, b), b.shape[2]), dtype=torch.float32)


def no_states(b: Tensor) -> Tensor:
    return b.new_empty((0, b.shape[2]), dtype=torch.float32)


def forward(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = countable(a, b)
    p = Problem(b, cu_seqlens, a)
    final = states_of_empty_documents(b, cu_seqlens, initial_state) if output_final_state else None
    out = b.new_empty(b.shape)
    kept = b.new_empty((p.rows * (p.tokens // CHUNK) * p.channels,), dtype=torch.float32)
    operands = {"a": a, "b": b, "initial_state": initial_state, **strides(a=a, b=b), **p.shared, "CHUNK": CHUNK}
    entering = None
    if p.segments > 1:
        local, product = p.of_segments(b), p.of_segments(b)
        nothing = dict.fromkeys(("entering", "out", "final_state", "chunk_states"))
        launch(walk, p.grid, **operands, **nothing, local=local, product=product, OUTPUT=False)
        entering = p.enter_segments(local, product, reverse=False)
    results = {"out": out, "final_state": final, "chunk_states": kept, "local": None, "product": None}
    launch(walk, p.grid, **operands, **results, entering=entering, OUTPUT=True)
    return out, no_states(b) if final is None else final, kept
