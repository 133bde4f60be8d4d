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

CHUNK = 64
"""The state that enters every chunk of so many tokens is kept for the backward."""


class Stretch(NamedTuple):
    """Documents that are walked together: all the rows, or one packed document."""

    states: slice
    tokens: range


class Arguments(NamedTuple):
    """In the dtype of the states, delta as it enters the recurrence, B and C with their axis of groups."""

    u: Tensor
    raw_delta: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    stretches: list[Stretch]
    initial_state: Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 as soon as one argument is, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


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
    return Arguments(
        u=u.to(dtype),
        raw_delta=raw_delta,
        delta=F.softplus(raw_delta) if delta_softplus else raw_delta,
        A=A.to(dtype),
        B=(B if B.ndim == 4 else B.unsqueeze(2)).to(dtype),
        C=(C if C.ndim == 4 else C.unsqueeze(2)).to(dtype),
        D=None if D is None else D.to(dtype),
        z=None if z is None else z.to(dtype),
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
        decay = torch.exp(args.delta[:, t, :, None] * args.A)
        x = args.delta[:, t] * args.u[:, t]
        entering, h = h, decay * h + x[..., None] * per_channel(args.B[:, t], x.shape[-1])
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
    outs, finals, kept = [args.u[:, :0]], [], [args.initial_state.new_zeros((u.shape[0], 0, A.shape[1], A.shape[0]))]
    for stretch in args.stretches:
        h = args.initial_state[stretch.states]
        for t, entering, h in walk(args, stretch):
            if t % CHUNK == 0:
                kept.append(rearrange(entering.detach(), "b d n -> b 1 n d"))
            C_t = per_channel(args.C[:, t], u.shape[2])
            outs.append(torch.einsum("b d n, b d n -> b d", h, C_t).unsqueeze(1))
        finals.append(h)
    y = torch.cat(outs, 1)
    if args.D is not None:
        y = y + args.D * args.u
    if args.z is not None:
        y = y * F.silu(args.z)
    final = torch.cat(finals) if output_final_state else args.initial_state.new_zeros((0, *A.shape))
    return y.to(u.dtype).contiguous(), final.contiguous(), torch.cat(kept, 1).flatten()


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
) -> Gradients:
    """Written out, since an op's kernel runs below autograd. The states are walked again and all kept."""
    args = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    dout = dout.to(args.u.dtype)
    gate = torch.ones_like(args.u) if args.z is None else F.silu(args.z)
    dy = dout * gate
    y = args.u * (0 if args.D is None else args.D)
    du = dy * (0 if args.D is None else args.D)
    ddelta, dA = torch.zeros_like(args.u), torch.zeros_like(args.A)
    dB, dC = torch.zeros_like(args.B), torch.zeros_like(args.C)
    dinitial = torch.zeros_like(args.initial_state)
    channels, groups = u.shape[2], args.B.shape[2]
    for stretch in args.stretches:
        rows = args.initial_state[stretch.states]
        dh = torch.zeros_like(rows) if dfinal_state is None else dfinal_state[stretch.states].to(rows.dtype)
        for t, before, h in reversed(list(walk(args, stretch))):
            delta_t, u_t = args.delta[:, t, :, None], args.u[:, t, :, None]
            B_t, C_t = per_channel(args.B[:, t], channels), per_channel(args.C[:, t], channels)
            y[:, t] += (h * C_t).sum(-1)
            dh = dh + dy[:, t, :, None] * C_t
            dC[:, t] = per_group(dy[:, t, :, None] * h, groups)
            dB[:, t] = per_group(dh * delta_t * u_t, groups)
            dx = (dh * B_t).sum(-1)
            dh = dh * torch.exp(delta_t * args.A)
            dexponent = dh * before
            dA += (dexponent * delta_t).sum(0)
            ddelta[:, t] = (dexponent * args.A).sum(-1) + dx * args.u[:, t]
            du[:, t] += dx * args.delta[:, t]
        dinitial[stretch.states] = dh
    if delta_softplus:
        ddelta = ddelta * torch.sigmoid(args.raw_delta)
    return Gradients(
        u=du.to(u.dtype),
        delta=ddelta.to(delta.dtype),
        A=dA.to(A.dtype),
        B=dB.view(B.shape).to(B.dtype),
        C=dC.view(C.shape).to(C.dtype),
        D=None if D is None else (dy * args.u).sum((0, 1)).to(D.dtype),
        z=None if z is None or args.z is None else (dout * y * silu_slope(args.z)).to(z.dtype),
        delta_bias=None if delta_bias is None else ddelta.sum((0, 1)).to(delta_bias.dtype),
        initial_state=None if initial_state is None else dinitial.to(initial_state.dtype),
    )


def silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))
