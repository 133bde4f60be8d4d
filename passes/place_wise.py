"""Ops by which the places of a batch, the entries of a value's first axes, stay apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from packc.passes.axes import value_of

aten = torch.ops.aten

_ENTRYWISE = {
    *(aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default),
    *(aten.detach.default, aten.dropout.default),
}
_ALONG_AN_AXIS = {
    *(aten.softmax.int, aten.log_softmax.int, aten.gather.default, aten.slice.Tensor, aten.select.int),
    *(aten.squeeze.dim, aten.unsqueeze.default, aten.logsumexp.default, aten.sum.dim_IntList, aten.mean.dim),
}


def is_entrywise(node: fx.Node) -> bool:
    """Whether every entry of the result is made of the entries at its place, up to broadcasting."""
    target = node.target
    return isinstance(target, OpOverload) and (torch.Tag.pointwise in target.tags or target in _ENTRYWISE)


def works_behind(node: fx.Node, rank: int) -> bool:
    """Whether a value is worked on along axes behind the first ``rank`` of them, and the op looks at no others."""
    return node.target in _ALONG_AN_AXIS and all(dim >= rank for dim in dims_of(node))


def dims_of(node: fx.Node) -> list[int]:
    """The axes along which an op works, counted from the front."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("dim")
    given: Any = node.args[at] if at < len(node.args) else node.kwargs.get("dim", 0)
    rank = value_of(node.args[0]).ndim + (node.target is aten.unsqueeze.default)
    return [dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])]
