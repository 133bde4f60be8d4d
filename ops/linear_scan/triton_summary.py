"""The linear scan's summary and adjoint on Triton: its first walks, of the two documents into which a place cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from packc.ops import documents
from packc.ops.linear_scan.reference import CHUNK
from packc.ops.linear_scan.triton_backward import edges
from packc.ops.linear_scan.triton_forward import Problem, walk
from packc.ops.tritonsrc.launch import launch
from packc.ops.tritonsrc.tokens import countable, strides


def summary(a: Tensor, b: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    transition = documents.select_from(begin, a.float(), 1).prod(1)
    if b.shape[1] == 0:
        return transition, torch.zeros_like(transition)
    a, b = countable(a, b)
    p = Problem(b, documents.cut(begin, b), a)
    local, product = p.of_segments(b), p.of_segments(b)
    nothing = dict.fromkeys(("initial_state", "entering", "out", "final_state", "chunk_states"))
    operands = {"a": a, "b": b, **strides(a=a, b=b), **p.shared, "CHUNK": CHUNK, **nothing}
    launch(walk, p.grid, **operands, local=local, product=product, OUTPUT=False)
    entering = p.enter_segments(local, product, reverse=False)
    # What enters the last segment passes through it if the token in front is the summary's too.
    passes = begin < (p.segments - 1) * p.segment
    return transition, torch.where(begin < p.tokens, _leaves(local, product, entering, passes, -1), 0)


def adjoint(dout: Tensor, a: Tensor, end: Tensor) -> Tensor:
    if a.shape[1] == 0:
        return a.new_zeros((1, a.shape[2]), dtype=torch.float32)
    dout, a = countable(dout, a)
    p = Problem(a, documents.cut(end, a), dout)
    local, product = p.of_segments(a), p.of_segments(a)
    operands = {"dout": dout, "dfinal_state": None, "a": a, **strides(a=a, dout=dout), **p.shared}
    launch(edges, p.grid, **operands, local=local, product=product)
    arriving = p.enter_segments(local, product, reverse=True)
    return torch.where(end > 0, _leaves(local, product, arriving, end > p.segment, 0), 0)


def _leaves(local: Tensor, product: Tensor, entering: Tensor, passes: Tensor, at: int) -> Tensor:
    # As between segments: where zero enters, nothing passes, whatever the product is.
    passes = passes & (entering[:, at] != 0)
    return local[:, at] + torch.where(passes, product[:, at] * entering[:, at], 0)
