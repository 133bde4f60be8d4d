"""The linear recurrence in plain torch, one token after the other: the specification, in fp32, or fp64 for fp64 inputs.

Within a document (the RG-LRU's, https://arxiv.org/abs/2402.19427, eq. 4, with its input gate and normaliser in b):

    h[t] = a[t] h[t-1] + b[t]

and, with dh[t] the gradient of h[t] from all that comes of it:

    dh[t] = dout[t] + a[t+1] dh[t+1]      db[t] = dh[t]      da[t] = dh[t] h[t-1]
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.mixer import state_dtype

CHUNK = 16
"""The state that leaves every whole chunk of so many tokens of a row is kept for the backward.

It costs a sixteenth of ``h`` in fp32; the states of a chunk are then found again in registers and caches.
"""


class Gradients(NamedTuple):
    a: Tensor
    b: Tensor
    initial_state: Tensor | None


class Arguments(NamedTuple):
    """In the dtype of the states."""

    a: Tensor
    b: Tensor
    initial_state: Tensor
    stretches: list[tuple[slice, range]]  # documents that are walked together, and their tokens


def prepare(a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None) -> Arguments:
    dtype = state_dtype(a, b, initial_state)
    if cu_seqlens is None:
        stretches = [(slice(None), range(b.shape[1]))]
    else:
        starts = documents.offsets(cu_seqlens, b).tolist()
        stretches = [(slice(n, n + 1), range(start, end)) for n, (start, end) in enumerate(pairwise(starts))]
    if initial_state is None:
        initial_state = b.new_zeros((documents.count(cu_seqlens, b), *b.shape[2:]), dtype=dtype)
    return Arguments(a.to(dtype), b.to(dtype), initial_state.to(dtype), stretches)


def walk(args: Arguments) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The states that enter every token, those that leave it, and those that leave the documents."""
    before, after, finals = [], [], [args.initial_state[:0]]
    a, b = args.a.unbind(1), args.b.unbind(1)
    for rows, tokens in args.stretches:
        h = args.initial_state[rows]
        for t in tokens:
            before.append(h)
            h = a[t] * h + b[t]
            after.append(h)
        finals.append(h)
    return before, after, torch.cat(finals)


def forward(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, final_state, chunk_states)``."""
    args = prepare(a, b, cu_seqlens, initial_state)
    _, states, final = walk(args)
    after = documents.along_tokens(states, args.b)
    kept = after[:, CHUNK - 1 :: CHUNK].reshape(-1)
    return after.to(b.dtype), final if output_final_state else final[:0], kept.clone()


def backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    chunk_states: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> Gradients:
    """Written out, since an op's kernel runs below autograd. The states are walked again and all kept."""
    args = prepare(a, b, cu_seqlens, initial_state)
    before, _, _ = walk(args)
    decay, douts = args.a.unbind(1), dout.to(args.b.dtype).unbind(1)
    dinitial = [args.initial_state[:0]]
    db: list[Tensor] = []
    for rows, tokens in args.stretches:
        arriving = torch.zeros_like(args.initial_state[rows])
        if dfinal_state is not None:
            arriving = dfinal_state[rows].to(arriving.dtype)
        dh = []
        for t in reversed(tokens):
            dh.append(douts[t] + arriving)
            arriving = decay[t] * dh[-1]
        db += reversed(dh)
        dinitial.append(arriving)
    da = [dh * h for dh, h in zip(db, before, strict=True)]
    return Gradients(
        documents.along_tokens(da, args.a).to(a.dtype),
        documents.along_tokens(db, args.b).to(b.dtype),
        None if initial_state is None else torch.cat(dinitial).to(initial_state.dtype),
    )


def summary(a: Tensor, b: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """The transition is the product of ``a``, ``(1, ...)``."""
    a, b = a[:, int(begin) :], b[:, int(begin) :]
    state = forward(a, b, None, None, True)[1]
    return a.to(state.dtype).prod(1), state


def adjoint(dout: Tensor, a: Tensor, end: Tensor) -> Tensor:
    """Of states that are affine in what enters, so that inputs may be any."""
    a, dout = a[:, : int(end)], dout[:, : int(end)]
    state = dout.new_zeros((1, *dout.shape[2:]), dtype=state_dtype(a, dout))
    dstate = backward(dout, None, state, a, dout, None, state).initial_state
    assert dstate is not None
    return dstate
