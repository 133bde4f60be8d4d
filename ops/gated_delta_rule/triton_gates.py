"""What is left of a chunk's tokens, for either kind of gate, and the memory that the kernels share.

With a decay per head, products of keys and queries as they are get weights by token, on the side of the values. With
one per channel the keys and queries themselves do; sums of the log decays are made once, for all that need them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from packc.ops.common.chunks import CHUNK
from packc.ops.common.triton_chunks import Chunks, chunk_of, inside_of, load_tile, token_strides
from packc.ops.common.triton_products import log_decays
from packc.ops.linear_attention.triton_states import block_of
from packc.ops.tritonsrc.launch import autotuned, launch


class Gate(NamedTuple):
    """One of the two: log decays of heads, or the sums of those of channels from each chunk's start."""

    g: Tensor | None  # (B, L, H)
    sums: Tensor | None  # (2, B, L, H, K): in two parts, as log_decays makes them

    @property
    def per_channel(self) -> bool:
        return self.sums is not None

    def arguments(self) -> dict[str, Any]:
        return {"g": self.g, "sums": self.sums, **token_strides(g=self.g)}


@triton.jit
def dense_tile(x, row, token, head, tokens, heads, first, channels, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to channels ``first ..`` of a chunk's tokens in a dense ``(rows, tokens, heads, channels)`` tensor."""
    x += ((row * tokens + token) * heads + head) * channels + first
    return x + (tl.arange(0, CHUNK)[:, None] * (heads * channels) + tl.arange(0, BLOCK)[None, :])


@triton.jit
def load_dense(x, row, token, head, tokens, heads, length, first, channels, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    at = dense_tile(x, row, token, head, tokens, heads, first, channels, CHUNK, BLOCK)
    return tl.load(at, inside_of(length, channels - first, CHUNK, BLOCK), 0.0)


@triton.jit
def store_dense(
    x, value, row, token, head, tokens, heads, length, first, channels, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    at = dense_tile(x, row, token, head, tokens, heads, first, channels, CHUNK, BLOCK)
    tl.store(at, value.to(x.dtype.element_ty), inside_of(length, channels - first, CHUNK, BLOCK))


@triton.jit
def pair_tile(x, chunk, head, heads, first, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to what all tokens have with tokens ``first ..``, in a ``(chunks, heads, CHUNK, CHUNK)`` tensor."""
    t, w = tl.arange(0, CHUNK), first + tl.arange(0, WIDTH)
    return x + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK + (t[:, None] * CHUNK + w[None, :])


@triton.jit
def pair_tile_transposed(x, chunk, head, heads, first, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to what tokens ``first ..`` have with all tokens, which come first."""
    t, w = tl.arange(0, CHUNK), first + tl.arange(0, WIDTH)
    return x + (chunk.to(tl.int64) * heads + head) * CHUNK * CHUNK + (w[None, :] * CHUNK + t[:, None])


@triton.jit
def load_sums(sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Both parts of the sums of a chunk's log decays, of channels ``first ..``."""
    fine = sums + rows.to(tl.int64) * tokens * heads * K
    return (
        load_dense(sums, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK),
        load_dense(fine, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK),
    )


@triton.jit
def load_last(sums, row, token, head, rows, tokens, heads, length, first, K, BLOCK: tl.constexpr):
    """The same of the chunk's last token alone: of all its tokens."""
    c = first + tl.arange(0, BLOCK)
    at = sums + ((row * tokens + token + length - 1) * heads + head) * K + c
    return tl.load(at, c < K, 0.0), tl.load(at + rows.to(tl.int64) * tokens * heads * K, c < K, 0.0)


@triton.jit
def channels_from_start(
    sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """What is left in each token of what enters the chunk."""
    coarse, fine = load_sums(sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK)
    return tl.exp2(coarse + fine)


@triton.jit
def channels_to_end(
    sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """What is left of each token in what leaves the chunk; 1 outside."""
    coarse, fine = load_sums(sums, row, token, head, rows, tokens, heads, length, first, K, CHUNK, BLOCK)
    last_coarse, last_fine = load_last(sums, row, token, head, rows, tokens, heads, length, first, K, BLOCK)
    exponent = (last_coarse[None, :] - coarse) + (last_fine[None, :] - fine)
    return tl.exp2(tl.where((tl.arange(0, CHUNK) < length)[:, None], exponent, 0.0))


@triton.jit
def channels_whole(sums, row, token, head, rows, tokens, heads, length, first, K, BLOCK: tl.constexpr):
    """What is left, in what leaves the chunk, of what enters it."""
    coarse, fine = load_last(sums, row, token, head, rows, tokens, heads, length, first, K, BLOCK)
    return tl.exp2(coarse + fine)


@autotuned([triton.Config({}, num_warps=4, num_stages=1)], key=["K"])
@triton.jit(do_not_specialize=["g_b", "rows", "tokens"])
def _sum_log_decays(
    g,
    table,
    sums,
    rows,
    tokens,
    heads,
    K,
    g_b,
    g_strides,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, _, token, length, _, _ = chunk_of(table, PACKED)
    if length > 0:
        head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_K
        coarse, fine = log_decays(load_tile(g, row, token, head, length, g_b, g_strides, first, K, CHUNK, BLOCK_K))
        store_dense(sums, coarse, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK_K)
        rest = sums + rows.to(tl.int64) * tokens * heads * K
        store_dense(rest, fine, row, token, head, tokens, heads, length, first, K, CHUNK, BLOCK_K)


def gate_of(g: Tensor, chunks: Chunks) -> Gate:
    """Of fp32 ``(B, L, H)`` or ``(B, L, H, K)``, any strides."""
    if g.ndim == 3:
        return Gate(g, None)
    rows, tokens, heads, K = g.shape
    sums = g.new_empty((2, *g.shape))
    block = block_of(K, g.dtype)
    launch(
        _sum_log_decays,
        (chunks.bound, heads, triton.cdiv(K, block)),
        g=g,
        table=chunks.table,
        sums=sums,
        rows=rows,
        tokens=tokens,
        heads=heads,
        K=K,
        PACKED=chunks.packed,
        CHUNK=CHUNK,
        BLOCK_K=block,
        **token_strides(g=g),
    )
    return Gate(None, sums)
