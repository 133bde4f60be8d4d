"""Ops by which the places of a batch, the entries of a value's first axes, stay apart."""

from __future__ import annotations

import torch
from torch import fx

from packc.passes.arguments import argument
from packc.passes.axes import is_tensor, value_of
from packc.passes.rules import rule_for
from packc.passes.rules.pointwise import pointwise

aten = torch.ops.aten

_ALONG_AN_AXIS = {
    *(aten.softmax.int, aten.log_softmax.int, aten.gather.default, aten.slice.Tensor, aten.select.int),
    *(aten.squeeze.dim, aten.unsqueeze.default, aten.logsumexp.default, aten.sum.dim_IntList, aten.mean.dim),
}


def is_entrywise(node: fx.Node) -> bool:
    """Whether every entry of the result is made of the entries at its place, up to broadcasting."""
    return is_tensor(node) and rule_for(node.target) is pointwise


def works_behind(node: fx.Node, rank: int) -> bool:
    """Whether a value is worked on along axes behind the first ``rank`` of them, and the op looks at no others."""
    return node.target in _ALONG_AN_AXIS and all(dim >= rank for dim in dims_of(node))


def dims_of(node: fx.Node) -> list[int]:
    """The axes along which an op works, counted from the front."""
    given = argument(node, "dim")
    rank = value_of(node.args[0]).ndim + (node.target is aten.unsqueeze.default)
    return [dim % rank for dim in (given if isinstance(given, (list, tuple)) else [given])]
