"""Tensors of a stream, cut over ranks and put together again.

Gradients of both are shares: what each rank's own results say of a value that all ranks have. They sum to the whole,
and so does what every rank finds of parameters. Where every rank computes the same loss of a whole tensor, each has W
times its share: their mean, which is what DDP and FSDP take of parameters, is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.distributed.outputs import cut_of
from packc.distributed.plans import Plan
from packc.ops.documents import differ

_library = torch.library.Library("packc", "FRAGMENT")
_library.define("unshard(Tensor x, Tensor shards, SymInt longest, SymInt size, str group) -> Tensor")
_collectives = torch.ops._c10d_functional


def shard(x: Tensor, plan: Plan) -> Tensor:
    """This rank's tokens of ``x (1, T, ...)``: ``(1, T_r, ...)``, a copy.

    ``x`` is the whole stream, equal on all ranks. Its gradient is this rank's share: zero at the tokens of others.
    """
    _check("shard", x, plan.shards, plan)
    return x.index_select(1, plan.tokens)


def unshard(x: Tensor, plan: Plan | None = None) -> Tensor:
    """The whole stream ``(1, T, ...)``, on all ranks, of their shards ``x (1, T_r, ...)``. Without a plan, of what a
    compiled model returned of this rank's tokens: the padded ``(B, L, ...)``, zero at padding.

    Shards are gathered as if all were as long as the longest. The gradient of ``x`` is the sum over ranks of those that
    they have for these tokens: if all compute the same of the whole, W times its own.
    """
    if plan is None:
        return cut_of(x).padded(x)
    _check("unshard", x, plan.tokens, plan)
    if plan.size == 1:
        return x
    return torch.ops.packc.unshard.default(x, plan.shards, plan.longest, plan.size, plan.group)


def _check(name: str, x: Tensor, tokens: Tensor, plan: Plan) -> None:
    if x.ndim < 2 or differ(x.shape[0], 1) or differ(x.shape[1], tokens.shape[0]):
        raise ValueError(f"{name}: x must be (1, {tokens.shape[0]}, ...), not {tuple(x.shape)}, with {plan}")


class _Gather(torch.autograd.Function):
    """The derivative of each is the other, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Tensor, longest: int, size: int, group: str) -> Tensor:
        ctx.others, ctx.tokens = (longest, size, group), x.shape[1]
        ctx.save_for_backward(shards)
        padded = torch.cat([x, x.new_zeros((1, longest - x.shape[1], *x.shape[2:]))], 1)
        found = _collectives.all_gather_into_tensor.default(padded.squeeze(0), size, group)
        return _collectives.wait_tensor.default(found).index_select(0, shards).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (shards,) = ctx.saved_tensors
        return _Scatter.apply(grad, shards, ctx.tokens, *ctx.others), None, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Tensor, tokens: int, longest: int, size: int, group: str) -> Tensor:
        ctx.others = longest, size, group
        ctx.save_for_backward(shards)
        whole = x.new_zeros((size * longest, *x.shape[2:])).index_copy(0, shards, x.squeeze(0))
        found = _collectives.reduce_scatter_tensor.default(whole, "sum", size, group)
        return _collectives.wait_tensor.default(found)[:tokens].unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (shards,) = ctx.saved_tensors
        return _Gather.apply(grad, shards, *ctx.others), None, None, None, None, None


# One node to passes, which autograd opens, as mixers.py has it.
_library.impl("unshard", lambda *args: _Gather.apply(*args), "CompositeImplicitAutograd")
