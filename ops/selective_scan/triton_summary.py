"""The selective scan's summary and adjoint on Triton: its first walks, of the two documents into which a place cuts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops import documents
from packc.ops.selective_scan.reference import CHUNK
from packc.ops.selective_scan.triton_forward import BLOCK_D, WARPS, Problem, pairs_of, prepare, resident, walk
from packc.ops.selective_scan.triton_segments import pass_states
from packc.ops.selective_scan.triton_tokens import padded_tokens, tokens_last
from packc.ops.selective_scan.triton_walk_back import edges
from packc.ops.tritonsrc.launch import launch, taken
from packc.ops.tritonsrc.tokens import countable, strides, wide


def summary(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool, begin: Tensor
) -> tuple[Tensor, Tensor]:
    steps = delta.float() if delta_bias is None else delta.float() + delta_bias
    steps = documents.select_from(begin, F.softplus(steps) if delta_softplus else steps, 0).sum(1)
    if u.shape[1] == 0:
        return steps, steps.new_zeros((1, *A.shape))
    u, delta = countable(u, delta)
    p = prepare(u, A, B, documents.cut(begin, u), BLOCK_D, WARPS)
    carry, total = _of_segments(p, u)
    launch(
        walk,
        (p.segments * p.blocks,),
        u=u,
        delta=delta,
        pairs=pairs_of(B, None),
        padded=padded_tokens(p.tokens),
        **dict.fromkeys(("D", "z", "initial_state", "out", "final_state", "chunk_states")),
        **resident(p.states),
        **strides(u=u, delta=delta, z=None),
        **_shared(p, delta_bias, delta_softplus, wide(u, delta)),
        carry=carry,
        total=total,
        OUTPUT=False,
        CHUNK=CHUNK,
    )
    # What enters the last segment passes through it if the token in front is the summary's too.
    state = _leaves(p, carry, total, begin < (p.segments - 1) * p.segment, reverse=False)
    return steps, torch.where(begin < p.tokens, state, 0)


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
    if dout.shape[1] == 0:
        return dout.new_zeros((1, *A.shape), dtype=torch.float32)
    dout, delta, z = countable(dout, delta, z)
    p = prepare(dout, A, C, documents.cut(end, dout), BLOCK_D, WARPS)
    carry, total = _of_segments(p, dout)
    launch(
        edges,
        (p.segments * p.blocks,),
        dout=dout,
        dfinal_state=None,
        delta=delta,
        C=tokens_last(C),
        padded=padded_tokens(p.tokens),
        z=z,
        **strides(delta=delta, dout=dout, z=z),
        **taken(edges, _shared(p, delta_bias, delta_softplus, wide(dout, delta, z))),
        carry=carry,
        total=total,
    )
    return torch.where(end > 0, _leaves(p, carry, total, end > p.segment, reverse=True), 0)


def _of_segments(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    carry = x.new_empty((1, p.segments, p.states, p.channels), dtype=torch.float32)
    return carry, carry.new_empty((1, p.segments, p.channels))


def _shared(p: Problem, delta_bias: Tensor | None, softplus: bool, is_wide: bool) -> dict[str, object]:
    return {
        **p.sizes,
        "A": p.A,
        "delta_bias": None if delta_bias is None else delta_bias.contiguous(),
        "document": p.document,
        "SOFTPLUS": softplus,
        "PACKED": True,
        "WIDE": is_wide,
        "BLOCK_D": BLOCK_D,
    }


def _leaves(p: Problem, carry: Tensor, total: Tensor, passes: Tensor, reverse: bool) -> Tensor:
    """``(1, D, N)``: behind the last segment, or in front of the first one."""
    entering = torch.zeros_like(carry)
    pass_states(carry, total, p.A, p.document, entering, p.tokens, p.segment, reverse)
    at = 0 if reverse else -1
    passed = torch.exp2(total[:, at, None] * p.A) * entering[:, at]
    return (carry[:, at] + torch.where(passes, passed, 0)).mT.contiguous()
