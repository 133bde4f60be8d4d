"""One tile of tokens and channels in the scan's Triton kernels: what it reads and how it is scanned, either way.

A thread holds all BLOCK_T tokens of its channels, so that a scan along them is a chain of FMAs without any exchange
between threads (strides are not specialised: were they known to be 1, Triton would spread tokens over threads to make
the loads wider). Scans are written associatively all the same: no result depends on how Triton lays a tile out.

Where a document begins the decay is replaced by -1, which no exponential is, and the scan then selects instead of
multiplying: 0 times a neighbour's NaN would be NaN.
"""

import triton
import triton.language as tl

from packc.ops.tritonsrc.activations import softplus


@triton.jit
def place(channels, groups, segments, BLOCK_D: tl.constexpr):
    """Row, segment, block, group, first channel of the block and end of the group's channels, of this program.

    Neighbouring programs are blocks of channels over the same tokens, which share B and C in the cache.
    """
    per_group = channels // groups
    blocks = tl.cdiv(per_group, BLOCK_D)
    block = tl.program_id(0) % (blocks * groups)
    stretch = tl.program_id(0) // (blocks * groups)
    group = block // blocks
    first = group * per_group + (block % blocks) * BLOCK_D
    return stretch // segments, stretch % segments, block, group, first, (group + 1) * per_group


@triton.jit
def load_tile(x, row, token, d, mask, x_b, x_t, x_d, BLOCK_T: tl.constexpr):
    """Tokens ``token, ...`` of channels ``d`` in fp32. 64 bits up to the tile, 32 within it."""
    base = x + row.to(tl.int64) * x_b + token.to(tl.int64) * x_t
    offset = (d.to(tl.int64) * x_d)[None, :] + (tl.arange(0, BLOCK_T) * x_t)[:, None]
    return tl.load(base + offset, mask, 0.0).to(tl.float32)


@triton.jit
def store_tile(x, value, row, token, d, mask, x_b, x_t, x_d, BLOCK_T: tl.constexpr):
    base = x + row.to(tl.int64) * x_b + token.to(tl.int64) * x_t
    offset = (d.to(tl.int64) * x_d)[None, :] + (tl.arange(0, BLOCK_T) * x_t)[:, None]
    tl.store(base + offset, value.to(x.dtype.element_ty), mask)


@triton.jit
def raw_step_sizes(delta, delta_bias, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T: tl.constexpr):
    raw = load_tile(delta, row, token, d, mask, delta_b, delta_t, delta_d, BLOCK_T)
    if delta_bias is not None:
        raw += tl.load(delta_bias + d, mask=d >= 0).to(tl.float32)[None, :]
    return raw


@triton.jit
def step_sizes(raw, mask, SOFTPLUS: tl.constexpr):
    """delta as it enters the recurrence; zero outside, which leaves a state as it is."""
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(mask, raw, 0.0)


@triton.jit
def boundaries(document, token, L, PACKED: tl.constexpr, BLOCK_T: tl.constexpr):
    """Documents of a tile's tokens, where they start, where they end, and whether any does either."""
    t = token + tl.arange(0, BLOCK_T)
    if PACKED:
        inside = t < L
        here = tl.load(document + t, inside, 0)
        before = tl.load(document + t - 1, inside & (t > 0), -1)
        after = tl.load(document + t + 1, t + 1 < L, -1)
        start, end = inside & (here != before), inside & (here != after)
        left = tl.load(document + token - 1, token > 0, -1)
        right = tl.load(document + token + BLOCK_T, token + BLOCK_T < L, -2)
        boundary = left != right
    else:
        here, start, end = t, t < 0, t < 0
        boundary = token < 0
    return here.to(tl.int64)[:, None], start[:, None], end[:, None], boundary


# ---- scans -----------------------------------------------------------------------------------------------------------


@triton.jit
def _then(a1, h1, a2, h2):
    """h[t] = a[t] h[t-1] + b[t] over two stretches."""
    return a1 * a2, a2 * h1 + h2


@triton.jit
def _then_or_start(a1, h1, a2, h2):
    starts = a2 < 0
    return tl.where(starts, a2, tl.where(a1 < 0, a1, a1 * a2)), tl.where(starts, h2, a2 * h1 + h2)


@triton.jit
def scan(a, b, entering, start, boundary, BLOCK_T: tl.constexpr):
    """h of a tile for decays ``a``, inputs ``b`` and the state that enters it."""
    first = (tl.arange(0, BLOCK_T) == 0)[:, None]
    if boundary:
        b = tl.where(first & ~start, a * entering[None, :] + b, b)
        _, h = tl.associative_scan((tl.where(start, -1.0, a), b), 0, _then_or_start)
    else:
        b = tl.where(first, a * entering[None, :] + b, b)
        _, h = tl.associative_scan((a, b), 0, _then)
    return h


@triton.jit
def _before(a2, p2, g2, a1, p1, g1):
    """g[t] = c[t] + a[t+1] g[t+1] over two stretches, the right one first, as a reverse scan calls it.

    A stretch is the map g = g' + p m of the gradient m = a[t] g[t] that comes from the token t behind it, and the
    decay a of its own first token.
    """
    through = p1 * a2
    return a1, through * p2, through * g2 + g1


@triton.jit
def _before_or_start(a2, p2, g2, a1, p1, g1):
    cut = (a2 < 0) | (p1 < 0)  # p = -1: nothing from behind comes through
    through = p1 * a2
    return a1, tl.where(cut | (p2 < 0), -1.0, through * p2), tl.where(cut, g1, through * g2 + g1)


@triton.jit
def scan_back(a, c, arriving, start, end, boundary, BLOCK_T: tl.constexpr):
    """The gradients g of a tile's states, for their own ``c`` and the ``a g`` that arrives from the token behind it."""
    last = (tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None]
    ones = tl.full(a.shape, 1.0, tl.float32)
    if boundary:
        c = tl.where(last & ~end, c + arriving[None, :], c)
        _, _, g = tl.associative_scan((tl.where(start, -1.0, a), ones, c), 0, _before_or_start, reverse=True)
    else:
        c = tl.where(last, c + arriving[None, :], c)
        _, _, g = tl.associative_scan((a, ones, c), 0, _before, reverse=True)
    return g


@triton.jit
def pick_token(x, i, BLOCK_T: tl.constexpr):
    """Row ``i`` of a tile. A sum of integers with zeros costs nothing once compiled, and no bit."""
    bits = x.to(tl.int32, bitcast=True)
    chosen = (tl.arange(0, BLOCK_T) == i)[:, None]
    return tl.sum(tl.where(chosen, bits, 0), 0).to(tl.float32, bitcast=True)
