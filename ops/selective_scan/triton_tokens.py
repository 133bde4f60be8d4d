"""Tokens as the scan reads them: its blocks of channels, its step sizes, its gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from packc.ops.tritonsrc.activations import silu, softplus
from packc.ops.tritonsrc.tokens import load_tokens


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
    return (stretch // segments).to(tl.int64), stretch % segments, block, group, first, (group + 1) * per_group


@triton.jit
def clear_states(at, d, in_d, channels, states, BLOCK_D: tl.constexpr):
    """Zeros to add to: not torch's, as a tuner launches a kernel again and again. A mask of the first tile would take
    registers all along."""
    for n in range(states):
        tl.store(at + n * channels + d, tl.zeros([BLOCK_D], tl.float32), in_d)
    # The first tile reads what is stored here.
    tl.debug_barrier()


@triton.jit
def step_sizes(raw, bias, token, L, SOFTPLUS: tl.constexpr, BLOCK_T: tl.constexpr):
    """delta as it enters the recurrence; zero behind the row's end, which leaves a state as it is."""
    steps = ()
    for r in tl.static_range(BLOCK_T):
        step = raw[r] + bias
        if SOFTPLUS:
            step = softplus(step)
        steps = steps + (tl.where(token + r < L, step, 0.0),)
    return steps


@triton.jit
def gated_gradients(dout, z, token, d, end, L, dout_t, z_t, BLOCK_T: tl.constexpr):
    """dy, the gradient in front of the gate, of a tile."""
    dys = load_tokens(dout, dout_t, token, d, end, L, BLOCK_T)
    if z is not None:
        zs = load_tokens(z, z_t, token, d, end, L, BLOCK_T)
        gated = ()
        for r in tl.static_range(BLOCK_T):
            gated = gated + (dys[r] * silu(zs[r]),)
        dys = gated
    return dys


TOKENS = 16  # rows of B and C are padded to a multiple of it, so that no tile reads behind their end


def tokens_last(x: Tensor) -> Tensor:
    """fp32 ``(rows, G, N, padded L)`` of B or C: tokens lie side by side, as a tile of the backward reads them."""
    grouped, tokens = x if x.ndim == 4 else x.unsqueeze(2), x.shape[1]
    rows, _, groups, states = grouped.shape
    laid = x.new_empty((rows, groups, states, padded_tokens(tokens)), dtype=torch.float32)
    if laid.shape[3] > tokens:
        laid[..., tokens:].zero_()
    laid[..., :tokens].copy_(grouped.permute(0, 2, 3, 1))  # one copy: F.pad would be another, of zeros
    return laid


def padded_tokens(tokens: int) -> int:
    return triton.cdiv(tokens, TOKENS) * TOKENS
