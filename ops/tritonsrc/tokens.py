"""Tokens in the scans' Triton kernels: what is read of them, and where their documents begin and end.

A program holds the tokens of a tile as a tuple of vectors over channels and walks them one by one, so that the
recurrence is a chain of FMAs within a thread whichever way it runs, and a document is left by selecting: 0 times a
neighbour's NaN would be NaN. A thread has neighbouring channels, and loads them at once where they are neighbours in
memory.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def channels_of(first, WIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block's channels, in 64 bits where 32 do not do (``wide``): they take registers all along."""
    d = first + tl.arange(0, BLOCK_D)
    return d.to(tl.int64) if WIDE else d


@triton.jit
def load_channels(x, d, in_d, BLOCK_D: tl.constexpr):
    """A vector over channels in fp32; zeros if there is none."""
    values = tl.zeros([BLOCK_D], tl.float32)
    if x is not None:
        values = tl.load(x + d, in_d, 0.0).to(tl.float32)
    return values


@triton.jit
def at_token(x, row, token, d, x_b, x_t, x_d):
    """Pointers to a token's channels. Tokens and channels are counted in as many bits as ``channels_of`` chose."""
    nth = tl.cast(row * x_b + token, d.dtype)
    return x + tl.cast(nth, tl.int64) * x_t + d * x_d


@triton.jit
def among(d, end, inside):
    """Channels below ``end``, of a token inside. The interpreter cannot ``&`` a vector with a scalar."""
    return d < tl.where(inside, end, 0)


@triton.jit
def load_tokens(pointers, x_t, token, d, end, L, BLOCK_T: tl.constexpr):
    """A tile in fp32, zero behind the row's end."""
    tokens = ()
    for r in tl.static_range(BLOCK_T):
        tokens = tokens + (tl.load(pointers + r * x_t, among(d, end, token + r < L), 0.0).to(tl.float32),)
    return tokens


@triton.jit
def store_token(pointers, value, d, end, inside):
    tl.store(pointers, value.to(pointers.dtype.element_ty), among(d, end, inside))


@triton.jit
def times(xs, ys, BLOCK_T: tl.constexpr):
    products = ()
    for r in tl.static_range(BLOCK_T):
        products = products + (xs[r] * ys[r],)
    return products


@triton.jit
def zeros(BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = ()
    for _ in tl.static_range(BLOCK_T):
        tile = tile + (tl.zeros([BLOCK_D], tl.float32),)
    return tile


@triton.jit
def documents_of(document, token, L, PACKED: tl.constexpr, BLOCK_T: tl.constexpr):
    """Documents of the token in front of a tile, of its own and of the one behind it; -1 where there is no token."""
    of = ()
    for r in tl.static_range(BLOCK_T + 2):
        if PACKED:
            t = token + r - 1
            of = of + (tl.load(document + t, (t >= 0) & (t < L), -1),)
        else:
            of = of + (-1,)
    return of


@triton.jit
def enter(state, of, r: tl.constexpr, own_states, d, end, n, channels, states, PACKED: tl.constexpr):
    """The state before token ``r`` of a tile: where a document begins its own, or zero, not the neighbour's.

    Behind the row's end no document begins: there the state stays as the row left it.
    """
    if PACKED:
        begins = (of[r] != of[r + 1]) & (of[r + 1] >= 0)
        if own_states is not None:
            if begins:
                state = load_own(own_states, of[r + 1], d, end, n, channels, states)
        else:
            state = tl.where(begins, 0.0, state)
    return state


@triton.jit
def arrive(gradient, of, r: tl.constexpr, own_gradients, d, end, n, channels, states, PACKED: tl.constexpr):
    """The gradient that reaches the state after token ``r`` from behind: where a document ends its final state's."""
    if PACKED:
        ends = of[r + 1] != of[r + 2]
        if own_gradients is not None:
            if ends:
                gradient = load_own(own_gradients, of[r + 1], d, end, n, channels, states)
        else:
            gradient = tl.where(ends, 0.0, gradient)
    return gradient


@triton.jit
def at_own(own, document, d, n, channels, states):
    """State n of a document in ``(documents, D, N)``: 64 bits for the document, 32 for channels, which share them."""
    return own + document.to(tl.int64) * channels * states + (d * states + n)


@triton.jit
def load_own(own, document, d, end, n, channels, states):
    at = at_own(own, document, d, n, channels, states)
    return tl.load(at, among(d, end, document >= 0), 0.0).to(tl.float32)


@triton.jit
def store_own(own, value, document, d, end, n, channels, states):
    tl.store(at_own(own, document, d, n, channels, states), value, among(d, end, document >= 0))


def countable(*tensors: Tensor | None) -> list[Any]:
    """Tensors ``(B, L, ...)`` whose rows lie whole tokens apart; others copied.

    Kernels count tokens from row to row. So Triton, which is told what a token's stride is a multiple of and never a
    row's, which new lengths change, knows the same of every address, and loads several values at once.
    """
    return [x if x is None or _rows_of_tokens(x) else x.contiguous() for x in tensors]


def _rows_of_tokens(x: Tensor) -> bool:
    row, token = x.stride()[:2]
    return x.shape[0] == 1 or row == 0 or (token > 0 and row % token == 0)


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Of :func:`countable` tensors ``(B, L, D)`` ``<name>_b``, in tokens, and ``<name>_t`` and ``_d``, in elements.

    Not one argument: the scans' kernels are compiled for each of the three in another way.
    """
    found: dict[str, int] = {}
    for name, x in tensors.items():
        token, channel = (0, 0) if x is None else x.stride()[1:]
        found |= {f"{name}_b": row_stride(x), f"{name}_t": token, f"{name}_d": channel}
    return found


def row_stride(x: Tensor | None) -> int:
    """Of a :func:`countable` tensor, in tokens."""
    return x.stride(0) // max(x.stride(1), 1) if x is not None and x.shape[0] > 1 else 0


def wide(*tensors: Tensor | None) -> bool:
    """Whether 32 bits do not count the tokens of a ``(B, L, D)`` tensor, or of its dense copy, or channels' offsets."""
    return any(x is not None and max(_tokens_spanned(x), x.shape[2] * x.stride(2)) >= 2**31 for x in tensors)


def _tokens_spanned(x: Tensor) -> int:
    return x.shape[0] * max(x.shape[1], x.stride(0) // max(x.stride(1), 1))
