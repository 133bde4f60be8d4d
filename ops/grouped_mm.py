"""``packc::grouped_mm``: products of rows that are sorted by group with a matrix for each, as experts have.

For CPUs, where torch has none for compiled graphs in fp32. Results and gradients are written once: nothing is filled
with zeros first, which for the gradients of weights costs the same whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from packc.ops import derivatives, dispatch
from packc.ops.definition import define


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``out[s] = x[s] @ weight[g]`` for each row s of group g; zero where a row is of none.

    Args:
        x: ``(S, K)``, rows of group 0 first.
        weight: ``(G, K, N)``, of the same dtype, any strides.
        ends: int32 or int64 ``(G,)``, ascending: behind the last row of each group. Rows behind all are of none.

    Returns:
        ``(S, N)``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    fits = x.ndim == 2 and weight.ndim == 3 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    if not fits or ends.shape != weight.shape[:1] or ends.dtype not in (torch.int32, torch.int64):
        given = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in (x, weight, ends))
        raise ValueError(f"grouped_mm: x (S, K), weight (G, K, N) and ends (G,), integers, expected; got {given}")
    return torch.ops.packc.grouped_mm.default(x, weight, ends)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    begin = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(begin, end)
        begin = end


def _forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if dispatch.wanted_kernels() == "reference":
        return _reference(x, weight, ends)
    out, last = x.new_empty(x.shape[0], weight.shape[2]), 0
    for group, rows in _groups(ends):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[group], out=out[rows])
        last = rows.stop
    out[last:] = 0
    return out


def _reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    parts = [x[rows] @ weight[group] for group, rows in _groups(ends)]
    rest = x.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, x.new_zeros(rest, weight.shape[2])])


def _backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    if dispatch.wanted_kernels() == "reference":
        grads = torch.func.vjp(lambda x, weight: _reference(x, weight, ends), x, weight)[1](grad)
        return grads[0], torch.empty_like(weight).copy_(grads[1])
    grad_x, grad_weight, last = x.new_empty(x.shape), torch.empty_like(weight), 0
    for group, rows in _groups(ends):
        if rows.stop > rows.start:
            torch.mm(grad[rows], weight[group].T, out=grad_x[rows])
            torch.mm(x[rows].T, grad[rows], out=grad_weight[group])
        else:
            grad_weight[group].zero_()
        last = rows.stop
    grad_x[last:] = 0
    return grad_x, grad_weight


def _forward_fake(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2]))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _setup(ctx: Any, args: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*args)


def _pull_back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*torch.ops.packc.grouped_mm_bwd.default(grad, *ctx.saved_tensors), None)


_INPUTS = "Tensor x, Tensor weight, Tensor ends"
define(f"grouped_mm({_INPUTS}) -> Tensor", _forward, _forward_fake)
define(
    f"grouped_mm_bwd(Tensor grad, {_INPUTS}) -> (Tensor grad_x, Tensor grad_weight)",
    _backward,
    _backward_fake,
)
derivatives.register("grouped_mm", _forward, _setup, _pull_back)
derivatives.register_gradients("grouped_mm_bwd", _backward)
