"""Products and decays within a chunk, exact enough for fp32 whatever the inputs.

bf16 and fp16 inputs meet on tensor cores as they are. Where they are the inputs, what is computed, in fp32, is a sum of
two bf16 numbers to its products, which is exact to 16 bits, a rounding of the inputs to 8 or 11; one bf16 number would
lose what the fp32 states are for. fp32 inputs are multiplied by six products of three bf16 parts each: IEEE products
would not use tensor cores.
"""

import torch
import triton
import triton.language as tl

from packc.ops.tritonsrc.activations import LOG2E
from packc.ops.tritonsrc.launch import interpreted

INTERPRETED = tl.constexpr(interpreted())


def fp32_products(dtype: torch.dtype) -> str:
    """How fp32 values are multiplied, where the inputs are of ``dtype``."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16x3"
    # The interpreter does not know it.
    return "ieee" if interpreted() else "bf16x6"


@triton.jit
def _dot_bf16(x, y):
    if INTERPRETED:  # it takes bf16 for integers
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y)


@triton.jit
def _to_bf16(x):
    if INTERPRETED:  # it truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    """Both as they are in memory."""
    if x.dtype == tl.bfloat16:
        return _dot_bf16(x, y)
    if x.dtype == tl.float16:
        return tl.dot(x, y)
    return dot_fp32(x, y, PRECISION)


@triton.jit
def dot_fp32(x, y, PRECISION: tl.constexpr):
    """Both in fp32."""
    if INTERPRETED and PRECISION == "bf16x3":
        x_high, y_high = _to_bf16(x), _to_bf16(y)
        x_low, y_low = _to_bf16(x - x_high.to(tl.float32)), _to_bf16(y - y_high.to(tl.float32))
        return _dot_bf16(x_low, y_high) + _dot_bf16(x_high, y_low) + _dot_bf16(x_high, y_high)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def dot_computed(x, y, PRECISION: tl.constexpr):
    """x in fp32, y as in memory."""
    if y.dtype == tl.bfloat16:
        high = _to_bf16(x)
        low = _to_bf16(x - high.to(tl.float32))
        return _dot_bf16(high, y) + _dot_bf16(low, y)
    return dot_fp32(x, y.to(tl.float32), PRECISION)


@triton.jit
def dot_by_computed(x, y, PRECISION: tl.constexpr):
    """x as in memory, y in fp32."""
    if x.dtype == tl.bfloat16:
        # As the left operand, each warp splits just its own rows of y; as the right one, every warp would all of it.
        return tl.trans(dot_computed(tl.trans(y), tl.trans(x), PRECISION))
    return dot_fp32(x.to(tl.float32), y, PRECISION)


@triton.jit
def log_decays(g):
    """Sums of a chunk's log decays from its start, to base 2, each as (multiple of 2^-8, rest).

    Decays between tokens are differences of such sums. In one fp32 number a strong decay would swamp the weak ones
    behind it; multiples of 2^-8 below 2^16 add without rounding, and the rests stay small. Nothing is left of a value
    after 2^-1024, so stronger decays are taken for that.
    """
    g = tl.maximum(g * LOG2E, -1024.0, propagate_nan=tl.PropagateNan.ALL)
    coarse = tl.floor(g * 256.0 + 0.5) * 0.00390625
    return tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0)


@triton.jit
def from_start(coarse, fine):
    """What is left in each token of what enters the chunk."""
    return tl.exp2(coarse + fine)


@triton.jit
def to_end(coarse, fine, CHUNK: tl.constexpr):
    """What is left of each token in what leaves the chunk. Behind the last token nothing decays."""
    last = tl.arange(0, CHUNK) == CHUNK - 1
    return tl.exp2(tl.sum(tl.where(last, coarse, 0.0), 0) - coarse + (tl.sum(tl.where(last, fine, 0.0), 0) - fine))


@triton.jit
def whole(coarse, fine, CHUNK: tl.constexpr):
    """What is left, in what leaves the chunk, of what enters it."""
    last = tl.arange(0, CHUNK) == CHUNK - 1
    return tl.exp2(tl.sum(tl.where(last, coarse + fine, 0.0), 0))


@triton.jit
def between(coarse, fine, CHUNK: tl.constexpr):
    """(i, j): what is left of token j in token i, and 0 for j > i."""
    t = tl.arange(0, CHUNK)
    exponent = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    seen = t[:, None] >= t[None, :]
    return tl.where(seen, tl.exp2(tl.where(seen, exponent, 0.0)), 0.0)


@triton.jit
def between_transposed(coarse, fine, CHUNK: tl.constexpr):
    """(j, i) of the same."""
    t = tl.arange(0, CHUNK)
    exponent = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    seen = t[None, :] >= t[:, None]
    return tl.where(seen, tl.exp2(tl.where(seen, exponent, 0.0)), 0.0)


@triton.jit
def select(weight, value):
    """weight * value, but 0 where the weight is: what a token and a later one make of each other may be NaN."""
    return tl.where(weight == 0, 0.0, weight * value)
