"""Activations in fp32, accurate in their tails, with nothing but what every Triton target and the interpreter have."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    # Powers of two are an instruction; tl.sigmoid's exponential is scaled, for the sake of denormal results.
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def softplus(x):
    # log(1 + e^x) = max(x, 0) + log1p(e^-|x|). The polynomial is log1p(e) / e for 0 <= e <= 1, to a relative 1e-7; a
    # logarithm of 1 + e would lose the digits of a small e.
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = e * -0.0031760570127516985 + 0.019542526453733444
    p = e * p - 0.056373611092567444
    p = e * p + 0.10543623566627502
    p = e * p - 0.1526966691017151
    p = e * p + 0.1966327428817749
    p = e * p - 0.24951615929603577
    p = e * p + 0.33329710364341736
    p = e * p - 0.49999892711639404
    p = e * p + 1.0
    return tl.maximum(x, 0.0) + e * p
