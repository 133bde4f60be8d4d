"""The gated delta rule in plain torch, one token after the other: the specification, in fp32, or fp64 for fp64 inputs.

For each head with its ``(K, V)`` state, within a document (Gated DeltaNet, https://arxiv.org/abs/2412.06464, eq. 10;
with a decay per channel, Kimi Delta Attention, https://arxiv.org/abs/2510.26692, eq. 1):

    kept[t]  = exp(g[t]) S[t-1]
    error[t] = v[t] - kept[t]^T k[t]
    S[t]     = kept[t] + beta[t] k[t] error[t]^T
    out[t]   = scale S[t]^T q[t]

Head h has the queries and keys of group ``h // (H / G)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import reduce, repeat
from torch import Tensor

from packc.ops import documents
from packc.ops.linear_attention.reference import CHUNK, chunk_states_shape, state_dtype


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None


class Arguments(NamedTuple):
    """In the dtype of the states, all of H heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor  # (B, L, H, K or 1, 1)
    beta: Tensor  # (B, L, H, 1)
    initial_state: Tensor
    stretches: list[tuple[slice, range]]  # documents that are walked together, and their tokens


class Step(NamedTuple):
    kept: Tensor
    error: Tensor
    state: Tensor  # that leaves the token


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Arguments:
    dtype, heads = state_dtype(q, k, v, g, beta, initial_state), v.shape[2]
    if cu_seqlens is None:
        stretches = [(slice(None), range(v.shape[1]))]
    else:
        starts = documents.offsets(cu_seqlens, v).tolist()
        stretches = [(slice(n, n + 1), range(start, end)) for n, (start, end) in enumerate(pairwise(starts))]
    if initial_state is None:
        state = v.new_zeros((documents.count(cu_seqlens, v), heads, k.shape[3], v.shape[3]), dtype=dtype)
    else:
        state = initial_state.to(dtype)
    return Arguments(
        q=_per_head(q, heads).to(dtype),
        k=_per_head(k, heads).to(dtype),
        v=v.to(dtype),
        decay=(g if g.ndim == 4 else g[..., None]).to(dtype).exp()[..., None],
        beta=beta[..., None].to(dtype),
        initial_state=state,
        stretches=stretches,
    )


def _per_head(x: Tensor, heads: int) -> Tensor:
    return repeat(x, "b l g k -> b l (g r) k", r=heads // max(x.shape[2], 1))


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("b h k, b h v -> b h k v", k, v)


def _read(state: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("b h k v, b h k -> b h v", state, k)


def _read_transposed(state: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("b h k v, b h v -> b h k", state, v)


def walk(args: Arguments, rows: slice, tokens: range) -> Iterator[tuple[int, Step]]:
    state = args.initial_state[rows]
    for t in tokens:
        kept = args.decay[:, t] * state
        error = args.v[:, t] - _read(kept, args.k[:, t])
        state = kept + _outer(args.k[:, t], args.beta[:, t] * error)
        yield t, Step(kept, error, state)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``."""
    args = prepare(q, k, v, g, beta, cu_seqlens, initial_state)
    outs, finals = [args.v[:, :0]], [args.initial_state[:0]]
    kept = args.initial_state.new_zeros(chunk_states_shape(k, v))
    for rows, tokens in args.stretches:
        state = args.initial_state[rows]
        for t, step in walk(args, rows, tokens):
            if t > tokens.start and (t - tokens.start) % CHUNK == 0:
                kept[:, t // CHUNK - 1, ..., : v.shape[3]] = state
            state = step.state
            outs.append(scale * _read(state, args.q[:, t]).unsqueeze(1))
        finals.append(state)
    final = torch.cat(finals) if output_final_state else args.initial_state[:0].clone()
    return torch.cat(outs, 1).to(v.dtype), final.contiguous(), kept.flatten()


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Gradients:
    """Written out, since an op's kernel runs below autograd."""
    args = prepare(q, k, v, g, beta, cu_seqlens, initial_state)
    dout = dout.to(args.v.dtype)
    dq, dk, dv = torch.zeros_like(args.q), torch.zeros_like(args.k), torch.zeros_like(args.v)
    dg, dbeta = torch.zeros_like(args.decay), torch.zeros_like(args.beta)
    dinitial = torch.zeros_like(args.initial_state)
    for rows, tokens in args.stretches:
        dS = torch.zeros_like(args.initial_state[rows])
        if dfinal_state is not None:
            dS = dfinal_state[rows].to(dS.dtype)
        for t, step in reversed(list(walk(args, rows, tokens))):
            dS = dS + scale * _outer(args.q[:, t], dout[:, t])
            dq[:, t] = scale * _read_transposed(step.state, dout[:, t])
            dcorrection = _read(dS, args.k[:, t])
            derror = args.beta[:, t] * dcorrection
            dbeta[:, t] = (dcorrection * step.error).sum(-1, keepdim=True)
            dv[:, t] = derror
            dk[:, t] = _read_transposed(dS, args.beta[:, t] * step.error) - _read_transposed(step.kept, derror)
            dkept = dS - _outer(args.k[:, t], derror)
            dg[:, t] = (dkept * step.kept).sum_to_size(dg[:, t].shape)
            dS = args.decay[:, t] * dkept
        dinitial[rows] = dS
    groups = q.shape[2]
    return Gradients(
        q=reduce(dq, "b l (g r) k -> b l g k", "sum", g=groups).to(q.dtype),
        k=reduce(dk, "b l (g r) k -> b l g k", "sum", g=groups).to(k.dtype),
        v=dv.to(v.dtype),
        g=dg.reshape(g.shape).to(g.dtype),
        beta=dbeta.reshape(beta.shape).to(beta.dtype),
        initial_state=None if initial_state is None else dinitial.to(initial_state.dtype),
    )
