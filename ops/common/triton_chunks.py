"""Documents in chunks of 64 tokens for Triton: a table that the device makes, and what a program reads of its chunk.

Each document is cut from its own start, so that no product ever holds tokens of two. How many chunks that makes only
the device knows; there are at most ``L // 64`` and one more a document, and programs beyond find one of no tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops import documents
from packc.ops.common.chunks import CHUNK
from packc.ops.common.triton_products import fp32_products
from packc.ops.tritonsrc import tokens
from packc.ops.tritonsrc.launch import launch

FIRST, LAST = tl.constexpr(1), tl.constexpr(2)
# Of a chunk's tokens: what larger kernels sum over at a time, so that their values stay in registers.
HALF, QUARTER = tl.constexpr(32), tl.constexpr(16)
_BLOCK = 256


class Chunks(NamedTuple):
    table: Tensor  # int32 (chunks, 4): document, first token within its row, tokens, FIRST | LAST
    first: Tensor  # int32 (documents + 1,): each document's first chunk
    starts: Tensor  # int32 (documents + 1,): each document's first token
    documents: int
    packed: bool  # whether they share row 0

    @property
    def bound(self) -> int:
        return self.table.shape[0]


@triton.jit(do_not_specialize=["length", "documents", "bound"])
def _tabulate(
    cu_seqlens,
    table,
    first,
    starts,
    length,  # of a row
    documents,
    bound,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a document; the last one ends the lists, and fills the table up."""
    document = tl.program_id(0)
    start = document * length
    chunk = document * tl.cdiv(length, CHUNK)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + document).to(tl.int32)
        before = tl.zeros([BLOCK], tl.int32)
        for other in range(0, document, BLOCK):
            d = other + tl.arange(0, BLOCK)
            end = tl.load(cu_seqlens + d + 1, d < document, 0)
            before += tl.cdiv(end - tl.load(cu_seqlens + d, d < document, 0), CHUNK).to(tl.int32)
        chunk = tl.sum(before, 0)
    tl.store(starts + document, start)
    tl.store(first + document, chunk)
    if document < documents:
        size = length
        begin = 0
        if cu_seqlens is not None:
            size = tl.load(cu_seqlens + document + 1).to(tl.int32) - start
            begin = start
        for nth in range(0, tl.cdiv(size, CHUNK), BLOCK):
            n = nth + tl.arange(0, BLOCK)
            rest = size - n * CHUNK
            at = table + (chunk + n).to(tl.int64) * 4
            flags = tl.where(n == 0, FIRST, 0) + tl.where(rest <= CHUNK, LAST, 0)
            tl.store(at, document, rest > 0)
            tl.store(at + 1, begin + n * CHUNK, rest > 0)
            tl.store(at + 2, tl.minimum(rest, CHUNK), rest > 0)
            tl.store(at + 3, flags, rest > 0)
    else:
        for nth in range(chunk, bound, BLOCK):
            n = nth + tl.arange(0, BLOCK)
            for column in tl.static_range(4):
                tl.store(table + n.to(tl.int64) * 4 + column, 0, n < bound)


def chunks_of(cu_seqlens: Tensor | None, x: Tensor) -> Chunks:
    """Of the documents of a ``(B, L, ...)`` tensor: one kernel, once a batch, as it is waited for."""
    found: Chunks = documents.once(cu_seqlens, ("chunks", x.shape[1]), lambda: _found(cu_seqlens, x))
    return found


def _found(cu_seqlens: Tensor | None, x: Tensor) -> Chunks:
    rows, length = x.shape[:2]
    count = documents.count(cu_seqlens, x)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        documents.check_offsets(cu_seqlens.long(), length)
    bound = rows * triton.cdiv(length, CHUNK) if cu_seqlens is None else length // CHUNK + count
    table, first, starts = (x.new_empty(size, dtype=torch.int32) for size in ((bound, 4), count + 1, count + 1))
    launch(
        _tabulate,
        (count + 1,),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        table=table,
        first=first,
        starts=starts,
        length=length,
        documents=count,
        bound=bound,
        CHUNK=CHUNK,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return Chunks(table, first, starts, count, packed=cu_seqlens is not None)


def shared_arguments(k: Tensor, v: Tensor, chunks: Chunks) -> dict[str, Any]:
    """Of every kernel that works on chunks."""
    return {
        "table": chunks.table,
        "rows": v.shape[0],
        "tokens": v.shape[1],
        "heads": v.shape[2],
        "groups": k.shape[2],
        "K": k.shape[3],
        "PACKED": chunks.packed,
        "CHUNK": CHUNK,
        "PRECISION": fp32_products(v.dtype),
    }


@triton.jit
def chunk_of(table, PACKED: tl.constexpr):
    """Row, document, first token, tokens, whether it is its document's first, and last, of this program's chunk."""
    at = table + tl.program_id(0).to(tl.int64) * 4
    document = tl.load(at)
    flags = tl.load(at + 3)
    row = 0 if PACKED else document
    return tl.cast(row, tl.int64), document.to(tl.int64), tl.load(at + 1), tl.load(at + 2), flags % 2 == 1, flags >= 2


@triton.jit
def tile_of(x, row, token, head, x_b, strides, first, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to channels ``first ..`` of a chunk's tokens: 64 bits to its corner, 32 from there (``countable``).

    Loops keep what is the same in every turn in registers: one number a pointer, not two.
    """
    x_t, x_h, x_d = strides
    x += (row * x_b + token) * x_t + head * x_h + tl.cast(first, tl.int64) * x_d
    return x + (tl.arange(0, CHUNK)[:, None] * x_t + tl.arange(0, BLOCK)[None, :] * x_d)


@triton.jit
def inside_of(length, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    return (tl.arange(0, CHUNK) < length)[:, None] & (tl.arange(0, BLOCK) < size)[None, :]


@triton.jit
def load_tile(x, row, token, head, length, x_b, strides, first, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """As it is in memory; zero outside."""
    at = tile_of(x, row, token, head, x_b, strides, first, CHUNK, BLOCK)
    return tl.load(at, inside_of(length, size - first, CHUNK, BLOCK), 0.0)


@triton.jit
def store_tile(x, value, row, token, head, length, x_b, strides, first, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    at = tile_of(x, row, token, head, x_b, strides, first, CHUNK, BLOCK)
    tl.store(at, value.to(x.dtype.element_ty), inside_of(length, size - first, CHUNK, BLOCK))


@triton.jit
def load_per_token(x, row, token, head, length, x_b, strides, CHUNK: tl.constexpr):
    """A scalar of each of a chunk's tokens."""
    t = tl.arange(0, CHUNK)
    x_t, x_h = strides
    x += (row * x_b + token) * x_t + head * x_h
    return tl.load(x + t * x_t, t < length, 0.0)


@triton.jit
def store_per_token(x, value, row, token, head, length, x_b, strides, CHUNK: tl.constexpr):
    t = tl.arange(0, CHUNK)
    x_t, x_h = strides
    x += (row * x_b + token) * x_t + head * x_h
    tl.store(x + t * x_t, value, t < length)


@triton.jit
def _load_state(x, nth, head, strides, first_k, first_v, K, V, there, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Block of a head's ``nth`` state ``(K, V)`` in fp32; zero outside, or if it is not ``there``."""
    x_n, x_h, x_k, x_v = strides
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    x += nth * x_n + head * x_h + tl.cast(first_k, tl.int64) * x_k + tl.cast(first_v, tl.int64) * x_v
    inside = (k < tl.where(there, K - first_k, 0))[:, None] & (v < V - first_v)[None, :]
    return tl.load(x + (k[:, None] * x_k + v[None, :] * x_v), inside, 0.0).to(tl.float32)


@triton.jit
def slots_behind(starts, document, count, slots, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Of its row, the slots from those of a document of ``count`` chunks to the next one's: nothing leads to them."""
    first = 0
    end = slots
    if PACKED:
        first = tl.load(starts + document) // CHUNK
        last = tl.load(starts + tl.num_programs(0))
        following = tl.load(starts + document + 1)
        end = tl.where(following < last, following // CHUNK, slots)
    return first + tl.maximum(count - 1, 0), end


@triton.jit
def load_between(kept, ends, place, first_k, first_v, K, V, WIDE_V, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Block of the state that enters a chunk, or of what leaves it.

    From ``ends (documents, heads, K, V)``, or None for zeros, at an end of its document, and else from ``kept``.
    ``place``: its slot there, document, whether it is at an end, head, heads, and the strides of ``ends``.
    """
    slot, document, at_end, head, heads, strides = place
    dense = heads * K * WIDE_V, K * WIDE_V, WIDE_V, 1
    state = _load_state(kept, slot, head, dense, first_k, first_v, K, V, at_end == 0, BLOCK_K, BLOCK_V)
    if ends is not None:
        state += _load_state(ends, document, head, strides, first_k, first_v, K, V, at_end, BLOCK_K, BLOCK_V)
    return state


def countable(*tensors: Tensor | None) -> list[Any]:
    """``(B, L, ...)`` tensors as kernels count in them: :func:`tokens.countable`, and in 32 bits within a chunk."""
    return [x if x is None or _within_32_bits(x) else x.contiguous() for x in tokens.countable(*tensors)]


def _within_32_bits(x: Tensor) -> bool:
    return CHUNK * x.stride(1) + 64 * (x.stride(3) if x.ndim > 3 else 0) < 2**31


def token_strides(**tensors: Tensor | None) -> dict[str, Any]:
    """``<name>_b``, of a row, in tokens, and ``<name>_strides``, of the other axes, of ``(B, L, H, ...)`` tensors."""
    rows = {f"{name}_b": tokens.row_stride(x) for name, x in tensors.items()}
    return rows | {f"{name}_strides": None if x is None else x.stride()[1:] for name, x in tensors.items()}


def state_strides(**tensors: Tensor | None) -> dict[str, Any]:
    """``<name>_strides`` of ``(documents, H, K, V)`` tensors."""
    return {f"{name}_strides": None if x is None else x.stride() for name, x in tensors.items()}
