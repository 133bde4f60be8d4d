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
from packc.ops.common.chunks import CHUNK, chunk_states
from packc.ops.mixer import state_dtype


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None


class Tokens(NamedTuple):
    """In the dtype of the states, all of H heads; for one token without L."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor  # (B, L, H, K or 1, 1)
    beta: Tensor  # (B, L, H, 1)


class Arguments(NamedTuple):
    all: Tokens
    one: list[Tokens]
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
    tokens = Tokens(
        q=_per_head(q, heads).to(dtype),
        k=_per_head(k, heads).to(dtype),
        v=v.to(dtype),
        decay=(g if g.ndim == 4 else g[..., None]).to(dtype).exp()[..., None],
        beta=beta[..., None].to(dtype),
    )
    # Taken apart at once: a slice for every token would be summed, in a derivative, as often as there are tokens.
    one = [Tokens(*token) for token in zip(*(x.unbind(1) for x in tokens), strict=True)]
    return Arguments(tokens, one, state, stretches)


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
        token = args.one[t]
        kept = token.decay * state
        error = token.v - _read(kept, token.k)
        state = kept + _outer(token.k, token.beta * error)
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
    outs, finals, chunk_starts = [], [args.initial_state[:0]], {}
    for rows, tokens in args.stretches:
        state = args.initial_state[rows]
        for t, step in walk(args, rows, tokens):
            if t > tokens.start and (t - tokens.start) % CHUNK == 0:
                chunk_starts[t // CHUNK - 1] = state
            state = step.state
            outs.append(scale * _read(state, args.one[t].q))
        finals.append(state)
    out, final = documents.along_tokens(outs, args.all.v), torch.cat(finals if output_final_state else finals[:1])
    return out.to(v.dtype), final, chunk_states(chunk_starts, k, args.all.v)


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    kept: Tensor,
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
    douts, dinitial = dout.to(args.all.v.dtype).unbind(1), [args.initial_state[:0]]
    grads: list[Tokens] = []
    for rows, tokens in args.stretches:
        dS = torch.zeros_like(args.initial_state[rows])
        if dfinal_state is not None:
            dS = dfinal_state[rows].to(dS.dtype)
        backwards = []
        for t, step in reversed(list(walk(args, rows, tokens))):
            token, dout_t = args.one[t], douts[t]
            dS = dS + scale * _outer(token.q, dout_t)
            dq = scale * _read_transposed(step.state, dout_t)
            dcorrection = _read(dS, token.k)
            derror = token.beta * dcorrection
            dbeta = (dcorrection * step.error).sum(-1, keepdim=True)
            dk = _read_transposed(dS, token.beta * step.error) - _read_transposed(step.kept, derror)
            dkept = dS - _outer(token.k, derror)
            dg = (dkept * step.kept).sum_to_size(token.decay.shape)
            dS = token.decay * dkept
            backwards.append(Tokens(dq, dk, derror, dg, dbeta))
        grads += reversed(backwards)
        dinitial.append(dS)
    dq, dk, dv, dg, dbeta = (
        documents.along_tokens([grad[n] for grad in grads], like) for n, like in enumerate(args.all)
    )
    groups = q.shape[2]
    return Gradients(
        q=reduce(dq, "b l (g r) k -> b l g k", "sum", g=groups).to(q.dtype),
        k=reduce(dk, "b l (g r) k -> b l g k", "sum", g=groups).to(k.dtype),
        v=dv.to(v.dtype),
        g=dg.reshape(g.shape).to(g.dtype),
        beta=dbeta.reshape(beta.shape).to(beta.dtype),
        initial_state=None if initial_state is None else torch.cat(dinitial).to(initial_state.dtype),
    )


def summary(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """The transition is a matrix ``(1, H, K, K)``: what becomes of the unit matrix where nothing is added to it."""
    k, v, g, beta = (x[:, int(begin) :] for x in (k, v, g, beta))
    _, state, _ = forward(k, k, v, g, beta, output_final_state=True)
    unit = torch.eye(k.shape[3], dtype=state.dtype, device=k.device).expand(1, v.shape[2], -1, -1)
    nothing = v.new_zeros((*v.shape[:3], k.shape[3]))
    _, transition, _ = forward(k, k, nothing, g, beta, initial_state=unit, output_final_state=True)
    return transition.contiguous(), state


def adjoint(dout: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float, end: Tensor) -> Tensor:
    """Of states that are affine in what enters, so that values may be any."""
    dout, q, k, g, beta = (x[:, : int(end)] for x in (dout, q, k, g, beta))
    dtype = state_dtype(dout, q, k, g, beta)
    state = dout.new_zeros((1, dout.shape[2], k.shape[3], dout.shape[3]), dtype=dtype)
    dstate = backward(dout, None, state, q, k, dout, g, beta, scale, None, state).initial_state
    assert dstate is not None
    return dstate
