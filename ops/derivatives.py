"""Derivatives of the ops: of any order, in reverse and in forward mode, and under ``torch.func``.

An op's kernels know its value and, as the ``_bwd`` op, its gradients. Everything beyond is torch's own derivative of
the op's reference, which is plain torch: there to any order, at the reference's cost. One kernel an op, at the
dispatcher's key ``Autograd``, chooses:

- no derivative asked for: the op itself;
- a tangent on an input (forward mode): the reference, in place of the op;
- an input that requires grad: the op, as a node of autograd's graph. That of an op is followed backwards by its
  ``_bwd`` op, that of a ``_bwd`` op through its reference.

The formulas that ``torch.library.register_autograd`` takes would do for the last alone: it drops tangents without a
word, and is refused by ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packc.ops import autograd, dispatch
from packc.ops.definition import LIBRARY
from packc.ops.untraced import untraced

Implementation = Callable[..., Any]
"""What an op runs on CPU and CUDA: by its reference, wherever ``dispatch.reference_only`` says so."""


def register(
    name: str,
    implementation: Implementation,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> None:
    """The derivatives of ``packc::name``, from formulas as ``torch.library.register_autograd`` takes them."""
    below = below_autograd(getattr(torch.ops.packc, name).default, implementation)

    def forward(ctx: Any, *args: Any) -> Any:
        results = below(*args)
        setup_context(ctx, args, results)
        return results

    def forward_of_a_transform(ctx: Any, *args: Any) -> Any:
        # What a node switches off inside is for autograd's kernels; those of the transforms around this one go on.
        with torch.enable_grad(), autograd.set_forward_mode(True):
            return forward(ctx, *args)

    untraced(implementation)
    pull_back = staticmethod(untraced(backward))
    nodes: list[Any] = [
        type(f"packc_{name}", (autograd.RefusesTangents,), {"forward": staticmethod(f), "backward": pull_back})
        for f in (forward, forward_of_a_transform)
    ]
    node, node_of_a_transform = nodes

    def differentiable(*args: Any) -> Any:
        if not autograd.gradients_asked(*args):
            if not autograd.tangents_given(*args):
                return below(*args)
        elif autograd.under_a_transform():
            if not autograd.tangents_given(*args):
                return autograd.apply(node_of_a_transform, *args)
        else:
            try:
                return node.apply(*args)
            except autograd.TangentGiven:
                pass
        with dispatch.reference_only():
            return implementation(*args)

    LIBRARY.impl(name, untraced(differentiable), "Autograd")


def below_autograd(op: Any, implementation: Implementation) -> Implementation:
    """``op`` of arguments of which nobody asks for a derivative: without a second way through the dispatcher, at best.

    That costs as much as a few tokens; on a GPU, nobody waits for it.
    """

    def below(*args: Any) -> Any:
        with autograd.below_autograd():
            return implementation(*args) if autograd.runs_on_cpu(*args) else op(*args)

    return below


def register_gradients(name: str, implementation: Implementation) -> None:
    """The derivatives of ``packc::name``, which has no kernels for them: those of its reference."""

    def setup_context(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        ctx.others = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        needed = [n for n, is_needed in enumerate(ctx.needs_input_grad) if is_needed]
        given = [n for n, grad in enumerate(grads) if grad is not None]

        if not given:
            return (None,) * len(args)

        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            for n, x in zip(needed, inputs, strict=True):
                args[n] = x
            with dispatch.reference_only():
                results = implementation(*args)
            results = (results,) if isinstance(results, Tensor) else results
            return tuple(results[n] for n in given)

        # torch.autograd.grad would take an input that another is made from for the source of both.
        pull_back = torch.func.vjp(gradients, *(args[n] for n in needed))[1]
        found = dict(zip(needed, pull_back(tuple(grads[n] for n in given)), strict=True))
        return tuple(found.get(n) for n in range(len(args)))

    register(name, implementation, setup_context, backward)
