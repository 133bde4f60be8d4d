"""Backwards that have no derivative say so, when one is asked for.

``torch.autograd.function.once_differentiable`` does so only if the gradient that comes in is to be differentiated;
that of a sum is not, and its derivative in the inputs would be missing without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Backward = Callable[..., tuple[Any, ...]]


def first_order(backward: Backward) -> Backward:
    """``backward`` of an ``autograd.Function``, without a graph; what is derived from its results raises."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        given = [n for n, grad in enumerate(found) if grad is not None]
        roots = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        marked = iter(_Last.apply(len(given), *[found[n] for n in given], *roots))
        return tuple(None if grad is None else next(marked) for grad in found)

    return once


class _Last(torch.autograd.Function):
    """The first so many tensors, as if they were made of the others."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> tuple[Any, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("ops with a plan have no second derivative")
