"""Linear attention in plain torch, one token after the other: the specification, in fp32, or fp64 for fp64 inputs.

For each head with its ``(K, V)`` state, within a document (Katharopoulos et al., https://arxiv.org/abs/2006.16236, eq.
18-20, without normaliser; with a scalar decay as RetNet, https://arxiv.org/abs/2307.08621, eq. 1, and, per token, SSD,
https://arxiv.org/abs/2405.21060, eq. 1 and section 5.2):

    S[t]   = exp(g[t]) S[t-1] + step[t] k[t] v[t]^T
    out[t] = scale S[t]^T q[t] + skip v[t]

Head h has the queries and keys of group ``h // (H / G)``. ``step`` and ``skip`` are SSD's: ``ssd`` has no kernel of its
own. With ``value_major`` states are ``(documents, H, V, K)`` outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import reduce, repeat
from torch import Tensor

from packc.ops import documents
from packc.ops.common.chunks import CHUNK, chunk_states
from packc.ops.mixer import state_dtype


class Gradients(NamedTuple):
    """None for absent arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    step: Tensor | None
    skip: Tensor | None
    initial_state: Tensor | None


class Tokens(NamedTuple):
    """In the dtype of the states, all of H heads: ``(B, L, H, ...)``, or without L for one token."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    step: Tensor


class Arguments(NamedTuple):
    """States ``(documents, H, K, V)``."""

    all: Tokens
    one: list[Tokens]
    initial_state: Tensor
    stretches: list[tuple[slice, range]]  # documents that are walked together, and their tokens


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    value_major: bool,
) -> Arguments:
    dtype = state_dtype(q, k, v, g, step, initial_state)
    heads, ones = v.shape[2], v.new_ones(v.shape[:3], dtype=dtype)
    if cu_seqlens is None:
        stretches = [(slice(None), range(v.shape[1]))]
    else:
        starts = documents.offsets(cu_seqlens, v).tolist()
        stretches = [(slice(n, n + 1), range(start, end)) for n, (start, end) in enumerate(pairwise(starts))]
    if initial_state is None:
        state = v.new_zeros((documents.count(cu_seqlens, v), heads, k.shape[3], v.shape[3]), dtype=dtype)
    else:
        state = (initial_state.mT if value_major else initial_state).to(dtype)
    tokens = Tokens(
        q=_per_head(q, heads).to(dtype),
        k=_per_head(k, heads).to(dtype),
        v=v.to(dtype),
        decay=ones if g is None else g.to(dtype).exp(),
        step=ones if step is None else step.to(dtype),
    )
    # Taken apart at once: a slice for every token would be summed, in a derivative, as often as there are tokens.
    one = [Tokens(*token) for token in zip(*(x.unbind(1) for x in tokens), strict=True)]
    return Arguments(tokens, one, state, stretches)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return repeat(x, "b l g k -> b l (g r) k", r=heads // max(x.shape[2], 1))


def walk(args: Arguments, rows: slice, tokens: range) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, the state that enters token t, the state that leaves it)."""
    state = args.initial_state[rows]
    for t in tokens:
        token = args.one[t]
        kv = torch.einsum("b h k, b h v -> b h k v", token.k, token.step[..., None] * token.v)
        before, state = state, token.decay[..., None, None] * state + kv
        yield t, before, state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    step: Tensor | None = None,
    skip: Tensor | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    value_major: bool = False,
    round_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``."""
    args = prepare(q, k, v, g, step, cu_seqlens, initial_state, value_major)
    outs, finals, kept = [], [args.initial_state[:0]], {}
    for rows, tokens in args.stretches:
        state = args.initial_state[rows]
        for t, before, state in walk(args, rows, tokens):
            if t > tokens.start and (t - tokens.start) % CHUNK == 0:
                kept[t // CHUNK - 1] = before
            outs.append(scale * torch.einsum("b h k, b h k v -> b h v", args.one[t].q, state))
        finals.append(state)
    out = documents.along_tokens(outs, args.all.v)
    if skip is not None:
        out = out + skip.to(out.dtype) * args.all.v
    final = torch.cat(finals if output_final_state else finals[:1])
    out = out.to(v.dtype) if round_out else out
    return out, (final.mT if value_major else final).contiguous(), chunk_states(kept, k, args.all.v)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    skip: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    value_major: bool,
) -> Gradients:
    """Written out, since an op's kernel runs below autograd."""
    args = prepare(q, k, v, g, step, cu_seqlens, initial_state, value_major)
    dout = dout.to(args.all.v.dtype)
    douts, dinitial = dout.unbind(1), [args.initial_state[:0]]
    grads: list[Tokens] = []
    for rows, tokens in args.stretches:
        dS = torch.zeros_like(args.initial_state[rows])
        if dfinal_state is not None:
            dS = (dfinal_state.mT if value_major else dfinal_state)[rows].to(dS.dtype)
        backwards = []
        for t, before, state in reversed(list(walk(args, rows, tokens))):
            token, dout_t = args.one[t], douts[t]
            step_t = token.step[..., None]
            dS = dS + scale * torch.einsum("b h k, b h v -> b h k v", token.q, dout_t)
            dq = scale * torch.einsum("b h k v, b h v -> b h k", state, dout_t)
            dk = torch.einsum("b h k v, b h v -> b h k", dS, step_t * token.v)
            dstepped = torch.einsum("b h k v, b h k -> b h v", dS, token.k)
            dS = token.decay[..., None, None] * dS
            dg, dstep = (dS * before).sum((-2, -1)), (dstepped * token.v).sum(-1)
            backwards.append(Tokens(dq, dk, step_t * dstepped, dg, dstep))
        grads += reversed(backwards)
        dinitial.append(dS)
    dq, dk, dv, dg, dstep = (
        documents.along_tokens([grad[n] for grad in grads], like) for n, like in enumerate(args.all)
    )
    if skip is not None:
        dv = dv + skip.to(dv.dtype) * dout
    dstate = torch.cat(dinitial)
    groups = q.shape[2]
    return Gradients(
        q=reduce(dq, "b l (g r) k -> b l g k", "sum", g=groups).to(q.dtype),
        k=reduce(dk, "b l (g r) k -> b l g k", "sum", g=groups).to(k.dtype),
        v=dv.to(v.dtype),
        g=None if g is None else dg.to(g.dtype),
        step=None if step is None else dstep.to(step.dtype),
        skip=None if skip is None else (dout * args.all.v).sum((0, 1)).to(skip.dtype),
        initial_state=None
        if initial_state is None
        else (dstate.mT if value_major else dstate).to(initial_state.dtype).contiguous(),
    )


def summary(
    k: Tensor, v: Tensor, g: Tensor | None, step: Tensor | None, value_major: bool, begin: Tensor
) -> tuple[Tensor, Tensor]:
    """The transition is the sum of the logarithms of decays, ``(1, H)``."""
    first = int(begin)
    k, v = k[:, first:], v[:, first:]
    g, step = (None if x is None else x[:, first:] for x in (g, step))
    _, state, _ = forward(k, k, v, g, step, output_final_state=True, value_major=value_major)
    return state.new_zeros((1, v.shape[2])) if g is None else g.sum(1).to(state.dtype), state


def adjoint(dout: Tensor, q: Tensor, g: Tensor | None, scale: float, value_major: bool, end: Tensor) -> Tensor:
    """Of states that are affine in what enters, so that keys and values may be any."""
    dout, q = dout[:, : int(end)], q[:, : int(end)]
    g = None if g is None else g[:, : int(end)]
    heads, K, V = dout.shape[2], q.shape[3], dout.shape[3]
    sizes = (1, heads, V, K) if value_major else (1, heads, K, V)
    state = dout.new_zeros(sizes, dtype=state_dtype(dout, q, g))
    dstate = backward(dout, None, state, q, q, dout, g, None, None, scale, None, state, value_major).initial_state
    assert dstate is not None
    return dstate
