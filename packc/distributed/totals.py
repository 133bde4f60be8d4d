"""Sums over the ranks of a group, of what each has of its own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packc.distributed.first_order import first_order

_library = torch.library.Library("packc", "FRAGMENT")
_library.define("total_over_ranks(Tensor x, str group) -> Tensor")
_collectives = torch.ops._c10d_functional


class _Total(torch.autograd.Function):
    """What ranks have of the gradient is summed, too. Where all compute the same of a total, that is W times its
    gradient, and where each reads it for tokens of its own, the sum of shares that are W times too large: either way W
    times the gradient of this rank's share, whose mean over ranks is the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: str) -> Tensor:
    """In fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
    found = _collectives.all_reduce.default(wide.contiguous(), "sum", group)
    return _collectives.wait_tensor.default(found).to(x.dtype)


# One node to passes, which autograd opens, as mixers.py has it.
_library.impl("total_over_ranks", lambda *args: _Total.apply(*args), "CompositeImplicitAutograd")
