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

CHUNK = 64
"""The state that enters every chunk of so many tokens of a document, but the first, is kept for the backward."""


class Gradients(NamedTuple):
    """None for absent arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    step: Tensor | None
    skip: Tensor | None
    initial_state: Tensor | None


class Arguments(NamedTuple):
    """In the dtype of the states, all of H heads; states ``(documents, H, K, V)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    step: Tensor
    initial_state: Tensor
    stretches: list[tuple[slice, range]]  # documents that are walked together, and their tokens


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 as soon as one argument is, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


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
    return Arguments(
        q=_per_head(q, heads).to(dtype),
        k=_per_head(k, heads).to(dtype),
        v=v.to(dtype),
        decay=ones if g is None else g.to(dtype).exp(),
        step=ones if step is None else step.to(dtype),
        initial_state=state,
        stretches=stretches,
    )


def chunk_states_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Of the states that enter chunks of a document but its first, at the chunk's first token // 64 - 1.

    Documents are cut into chunks from their own beginnings, so no two of those chunks begin in the same 64 tokens. Rows
    of V are padded to whole 16s, for vectors to fit. There is always a slot: traced, none would be another case.
    """
    rows, tokens, heads, V = v.shape
    return (rows, (tokens + CHUNK - 1) // CHUNK, heads, k.shape[3], (V + 15) // 16 * 16)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return repeat(x, "b l g k -> b l (g r) k", r=heads // max(x.shape[2], 1))


def walk(args: Arguments, rows: slice, tokens: range) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, the state that enters token t, the state that leaves it)."""
    state = args.initial_state[rows]
    for t in tokens:
        kv = torch.einsum("b h k, b h v -> b h k v", args.k[:, t], args.step[:, t, :, None] * args.v[:, t])
        before, state = state, args.decay[:, t, :, None, None] * state + kv
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
    outs, finals = [args.v[:, :0]], [args.initial_state[:0]]
    kept = args.initial_state.new_zeros(chunk_states_shape(k, v))
    for rows, tokens in args.stretches:
        state = args.initial_state[rows]
        for t, before, state in walk(args, rows, tokens):
            if t > tokens.start and (t - tokens.start) % CHUNK == 0:
                kept[:, t // CHUNK - 1, ..., : v.shape[3]] = before
            outs.append(scale * torch.einsum("b h k, b h k v -> b h v", args.q[:, t], state).unsqueeze(1))
        finals.append(state)
    out = torch.cat(outs, 1)
    if skip is not None:
        out = out + skip.to(out.dtype) * args.v
    final = torch.cat(finals) if output_final_state else args.initial_state[:0].clone()
    return out.to(v.dtype) if round_out else out, (final.mT if value_major else final).contiguous(), kept.flatten()


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
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
    dout = dout.to(args.v.dtype)
    dq, dk, dv = torch.zeros_like(args.q), torch.zeros_like(args.k), torch.zeros_like(args.v)
    dg, dstep = torch.zeros_like(args.decay), torch.zeros_like(args.step)
    dinitial = torch.zeros_like(args.initial_state)
    for rows, tokens in args.stretches:
        dS = torch.zeros_like(args.initial_state[rows])
        if dfinal_state is not None:
            dS = (dfinal_state.mT if value_major else dfinal_state)[rows].to(dS.dtype)
        for t, before, state in reversed(list(walk(args, rows, tokens))):
            step_t = args.step[:, t, :, None]
            dS = dS + scale * torch.einsum("b h k, b h v -> b h k v", args.q[:, t], dout[:, t])
            dq[:, t] = scale * torch.einsum("b h k v, b h v -> b h k", state, dout[:, t])
            dk[:, t] = torch.einsum("b h k v, b h v -> b h k", dS, step_t * args.v[:, t])
            dstepped = torch.einsum("b h k v, b h k -> b h v", dS, args.k[:, t])
            dv[:, t] = step_t * dstepped
            dstep[:, t] = (dstepped * args.v[:, t]).sum(-1)
            dS = args.decay[:, t, :, None, None] * dS
            dg[:, t] = (dS * before).sum((-2, -1))
        dinitial[rows] = dS
    if skip is not None:
        dv += skip.to(dv.dtype) * dout
    groups = q.shape[2]
    return Gradients(
        q=reduce(dq, "b l (g r) k -> b l g k", "sum", g=groups).to(q.dtype),
        k=reduce(dk, "b l (g r) k -> b l g k", "sum", g=groups).to(k.dtype),
        v=dv.to(v.dtype),
        g=None if g is None else dg.to(g.dtype),
        step=None if step is None else dstep.to(step.dtype),
        skip=None if skip is None else (dout * args.v).sum((0, 1)).to(skip.dtype),
        initial_state=None
        if initial_state is None
        else (dinitial.mT if value_major else dinitial).to(initial_state.dtype).contiguous(),
    )
