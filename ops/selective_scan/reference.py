"""The selective scan in plain torch, one token after the other: the specification, in fp32, or fp64 for fp64 inputs.

For each channel d with its N states, within a document (Gu and Dao, https://arxiv.org/abs/2312.00752, eq. 2a and 2b
with the discretisation of its section 2 and B's simplified to delta B, as every implementation has it):

    h[t]   = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t]
    y[t]   = C[t] . h[t] + D u[t]
    out[t] = y[t] silu(z[t])

where delta is ``softplus(delta + delta_bias)`` (softplus if asked for) and h before the first token is the document's
initial state. Arguments are as in the op's schema; B and C may be grouped.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from packc.ops import documents
from packc.ops.common.silu import silu_slope
from packc.ops.mixer import state_dtype

CHUNK = 64
"""The state that enters every chunk of so many tokens is kept for the backward."""


class Stretch(NamedTuple):
    """Documents that are walked together: all the rows, or one packed document."""

    states: slice
    tokens: range


class Token(NamedTuple):
    """Of all rows."""

    u: Tensor  # (B, D)
    delta: Tensor  # (B, D)
    B: Tensor  # (B, G, N)
    C: Tensor  # (B, G, N)


class Arguments(NamedTuple):
    """In the dtype of the states, delta as it enters the recurrence, B and C with their axis of groups."""

    u: Tensor
    raw_delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    tokens: list[Token]
    stretches: list[Stretch]
    initial_state: Tensor


def prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Arguments:
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    raw_delta = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    if initial_state is None:
        initial_state = A.new_zeros((documents.count(cu_seqlens, u), *A.shape), dtype=dtype)
    if cu_seqlens is None:
        stretches = [Stretch(slice(None), range(u.shape[1]))]
    else:
        starts = documents.offsets(cu_seqlens, u).tolist()
        stretches = [Stretch(slice(n, n + 1), range(start, end)) for n, (start, end) in enumerate(pairwise(starts))]
    u, B, C = u.to(dtype), *((x if x.ndim == 4 else x.unsqueeze(2)).to(dtype) for x in (B, C))
    delta = F.softplus(raw_delta) if delta_softplus else raw_delta
    return Arguments(
        u=u,
        raw_delta=raw_delta,
        A=A.to(dtype),
        B=B,
        C=C,
        D=None if D is None else D.to(dtype),
        z=None if z is None else z.to(dtype),
        # Taken apart at once: a slice for every token would be summed, in a derivative, as often as there are tokens.
        tokens=[Token(*token) for token in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True)],
        stretches=stretches,
        initial_state=initial_state.to(dtype),
    )


def per_channel(x: Tensor, channels: int) -> Tensor:
    """B or C of one token for every channel: channel d uses group d // (D / G)."""
    return repeat(x, "b g n -> b (g r) n", r=channels // x.shape[1])


def per_group(x: Tensor, groups: int) -> Tensor:
    return reduce(x, "b (g r) n -> b g n", "sum", g=groups)


def walk(args: Arguments, stretch: Stretch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, the state that enters token t, the state that leaves it) for the tokens of a stretch."""
    h = args.initial_state[stretch.states]
    for t in stretch.tokens:
        token = args.tokens[t]
        decay = torch.exp(token.delta[..., None] * args.A)
        x = token.delta * token.u
        entering, h = h, decay * h + x[..., None] * per_channel(token.B, x.shape[-1])
        yield t, entering, h


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``; differentiable by autograd too, all but the last."""
    args = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    outs, finals, kept = [], [args.initial_state[:0]], [args.initial_state.new_zeros((u.shape[0], 0, *A.shape[::-1]))]
    for stretch in args.stretches:
        h = args.initial_state[stretch.states]
        for t, entering, h in walk(args, stretch):
            if t % CHUNK == 0:
                kept.append(rearrange(entering.detach(), "b d n -> b 1 n d"))
            C_t = per_channel(args.tokens[t].C, u.shape[2])
            outs.append(torch.einsum("b d n, b d n -> b d", h, C_t))
        finals.append(h)
    y = documents.along_tokens(outs, args.u)
    if args.D is not None:
        y = y + args.D * args.u
    if args.z is not None:
        y = y * F.silu(args.z)
    final = torch.cat(finals if output_final_state else finals[:1])
    return y.to(u.dtype).contiguous(), final, torch.cat(kept, 1).flatten()


class Gradients(NamedTuple):
    """In the order of the ``_bwd`` op; None for absent arguments."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    channel_first_ddelta: bool,
) -> Gradients:
    """Written out, since an op's kernel runs below autograd. The states are walked again and all kept."""
    args = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    dout = dout.to(args.u.dtype)
    dy = dout if args.z is None else dout * F.silu(args.z)
    dys = dy.unbind(1)
    D_or_0 = 0 if args.D is None else args.D
    dA, dinitial = torch.zeros_like(args.A), [args.initial_state[:0]]
    of_tokens: list[tuple[Tensor, ...]] = []  # C . h, and gradients of u, delta, B and C
    channels, groups = u.shape[2], args.B.shape[2]
    for stretch in args.stretches:
        rows = args.initial_state[stretch.states]
        dh = torch.zeros_like(rows) if dfinal_state is None else dfinal_state[stretch.states].to(rows.dtype)
        backwards = []
        for t, before, h in reversed(list(walk(args, stretch))):
            token, dy_t = args.tokens[t], dys[t][..., None]
            delta_t, u_t = token.delta[..., None], token.u[..., None]
            B_t, C_t = per_channel(token.B, channels), per_channel(token.C, channels)
            dh = dh + dy_t * C_t
            dB_t, dC_t = per_group(dh * delta_t * u_t, groups), per_group(dy_t * h, groups)
            dx = (dh * B_t).sum(-1)
            dh = dh * torch.exp(delta_t * args.A)
            dexponent = dh * before
            dA = dA + (dexponent * delta_t).sum(0)
            ddelta_t = (dexponent * args.A).sum(-1) + dx * token.u
            backwards.append(((h * C_t).sum(-1), dx * token.delta, ddelta_t, dB_t, dC_t))
        of_tokens += reversed(backwards)
        dinitial.append(dh)
    likes = (args.u, args.u, args.u, args.B, args.C)
    y, du, ddelta, dB, dC = (
        documents.along_tokens([of_token[n] for of_token in of_tokens], like) for n, like in enumerate(likes)
    )
    y, du = y + args.u * D_or_0, du + dy * D_or_0
    if delta_softplus:
        ddelta = ddelta * torch.sigmoid(args.raw_delta)
    return Gradients(
        u=du.to(u.dtype),
        delta=(ddelta.mT.contiguous().mT if channel_first_ddelta else ddelta).to(delta.dtype),
        A=dA.to(A.dtype),
        B=dB.view(B.shape).to(B.dtype),
        C=dC.view(C.shape).to(C.dtype),
        D=None if D is None else (dy * args.u).sum((0, 1)).to(D.dtype),
        z=None if z is None or args.z is None else (dout * y * silu_slope(args.z)).to(z.dtype),
        delta_bias=None if delta_bias is None else ddelta.sum((0, 1)).to(delta_bias.dtype),
        initial_state=None if initial_state is None else torch.cat(dinitial).to(initial_state.dtype),
    )


def summary(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool, begin: Tensor
) -> tuple[Tensor, Tensor]:
    """The transition is the sum of the steps, ``(1, D)``."""
    u, delta, B = (x[:, int(begin) :] for x in (u, delta, B))
    steps = prepare(u, delta, A, B, B, None, None, delta_bias, delta_softplus, None, None).tokens
    _, state, _ = forward(u, delta, A, B, B, None, None, delta_bias, delta_softplus, output_final_state=True)
    return sum((token.delta for token in steps), state.new_zeros((1, A.shape[0]))), state


def adjoint(
    dout: Tensor,
    delta: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    end: Tensor,
) -> Tensor:
    """Of states that are affine in what enters, so that inputs may be any."""
    dout, delta, C = (x[:, : int(end)] for x in (dout, delta, C))
    z = None if z is None else z[:, : int(end)]
    state = A.new_zeros((1, *A.shape), dtype=state_dtype(dout, delta, A, C, z, delta_bias))
    rest = (delta_bias, delta_softplus, None, state, False)
    dstate = backward(dout, None, state, dout, delta, A, C, C, None, z, *rest).initial_state
    assert dstate is not None
    return dstate
