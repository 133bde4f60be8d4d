"""``varlen_attention`` with ``mask_mod``, a Python function, which no op can take: functions that autograd follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packc.ops import autograd, dispatch
from packc.ops.untraced import outside_of_graphs
from packc.ops.varlen_attention import reference
from packc.ops.varlen_attention.document_mask import MaskMod
from packc.ops.varlen_attention.op import choose

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@outside_of_graphs("varlen_attention: mask_mod is a Python function, which no op can take")
def with_mask_mod(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    mask_mod: MaskMod,
) -> Tensor:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.masked(q, k, v, cu_seqlens, causal, scale, window, mask_mod)

    chosen = choose("varlen_attention", q)
    if chosen == "cpu" and dispatch.wanted_kernels() == "cpu":
        raise ValueError('packc.config.kernels = "cpu": varlen_attention takes mask_mod by its reference only')
    if chosen != "triton" or autograd.under_a_transform() or autograd.tangents_given(q, k, v):
        return plain(q, k, v)
    from packc.ops.varlen_attention import flex

    def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex.masked(q, k, v, cu_seqlens, causal, scale, window, mask_mod)

    return differentiated_again(by_flex, plain, q, k, v)


def differentiated_again(attention: Attention, plain: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``attention``, whose gradients have none: where these are asked for, the gradients are those of ``plain``."""
    if not autograd.gradients_asked(q, k, v):
        return attention(q, k, v)
    passed: list[Tensor] = []  # the gradient of the result, from the node behind to the one in front
    return _Behind.apply(passed, attention(*_InFront.apply(passed, plain, q, k, v)))


class _InFront(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passed: list[Tensor], plain: Attention, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.passed, ctx.plain = passed, plain
        ctx.save_for_backward(*qkv)
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dout = ctx.passed.pop()
        if torch.is_grad_enabled():  # that is, create_graph
            grads = torch.func.vjp(ctx.plain, *ctx.saved_tensors)[1](dout)
        return None, None, *grads


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passed: list[Tensor], out: Tensor) -> Tensor:
        ctx.passed = passed
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        ctx.passed.append(dout)
        return None, dout
