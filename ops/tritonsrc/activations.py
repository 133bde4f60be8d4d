"""Activations in fp32, accurate in their tails, with nothing but what every Triton target and the interpreter have."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def softplus(x):
    # log(1 + e) loses the digits of a small e; log(w) / (w - 1) for the rounded w = 1 + e puts them back (Kahan).
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1 + e
    log1p = tl.where(w == 1, e, tl.log(w) * (e / (w - 1)))
    return tl.where(x > 20, x, log1p)
