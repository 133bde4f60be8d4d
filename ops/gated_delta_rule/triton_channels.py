"""Decays between any two tokens of a chunk, per channel: none is an exponential of a positive number.

exp(b_i - b_j), b the sums of g, would overflow as exp(b_i) exp(-b_j). But for any two tokens there is one power of two
so that they are of neighbouring blocks of so many tokens, which make a block of twice as many. The decay from j to i is
then that from j to the end of its block, times that from there to i: both at most 1. So with six sizes of blocks, sums
over channels are products of matrices.
"""

import triton
import triton.language as tl

LEVELS = tl.constexpr(6)  # of blocks in a chunk


@triton.jit
def decay_to_meeting(
    sums,
    coarse,
    fine,
    half,
    row,
    token,
    head,
    rows,
    tokens,
    heads,
    length,
    first,
    K,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of two blocks of ``half`` tokens: what is left of the first's tokens where it ends, and of that in the second's.

    1 outside. ``coarse`` and ``fine`` are the sums of log decays of the chunk's tokens.
    """
    t, c = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    end = t // (2 * half) * (2 * half) + half - 1
    inside = ((end < length) & (t < length))[:, None] & (c < K - first)[None, :]
    at = sums + ((row * tokens + token) * heads + head) * K + first + (end[:, None] * (heads * K) + c[None, :])
    exponent = coarse - tl.load(at, inside, 0.0)
    exponent += fine - tl.load(at + rows.to(tl.int64) * tokens * heads * K, inside, 0.0)
    exponent = tl.where((t > end)[:, None], exponent, -exponent)
    return tl.exp2(tl.where(inside, exponent, 0.0))


@triton.jit
def meets(half, CHUNK: tl.constexpr):
    """(i, j): whether j is of the first and i of the second of two blocks of ``half`` tokens."""
    block = tl.arange(0, CHUNK) // half
    return (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
