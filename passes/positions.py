"""Values that a model makes of positions alone: rotary tables, learned embeddings of positions, ``arange``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from packc.passes.arguments import argument
from packc.passes.axes import same_size, value_of
from packc.passes.choose import is_random
from packc.passes.sources import is_argument

aten = torch.ops.aten
_AROUND = {aten.flip.default, aten.roll.default, aten.linspace.default, aten.sort.default, aten.argsort.default}
_ALONG = {aten.softmax.int, aten.log_softmax.int, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default}
_STARTS = {aten.arange.start, aten.arange.start_step, aten.slice.Tensor}


def knows_only_positions(node: fx.Node) -> bool:
    """Whether a value along the rows is made of nothing that the caller passed, its size aside.

    In a row of several documents it is read from its beginning for each. Not so what is drawn at random: no two tokens
    share a draw.
    """
    return all(not (is_argument(each) if each.op == "placeholder" else is_random(each)) for each in _made_from(node))


def hangs_on_length(node: fx.Node, length: Any) -> fx.Node | None:
    """What makes a value of positions alone one that, read from its beginning, is not that of a shorter row: counted
    from the last position, or by how many there are. Of a length that is a number, as good as any other, only the op
    tells."""
    return next((each for each in _made_from(node) if _counts_otherwise(each, length)), None)


def _made_from(node: fx.Node) -> Iterator[fx.Node]:
    """A value and the values that it is made from."""
    seen, queue = set[fx.Node](), [node]
    while queue:
        each = queue.pop()
        if each not in seen and isinstance(value_of(each), (Tensor, list, tuple)):
            seen.add(each)
            yield each
            queue.extend(each.all_input_nodes)


def _counts_otherwise(node: fx.Node, length: Any) -> bool:
    if node.target in _STARTS:
        start = argument(node, "start")
        return start is not None and not (isinstance(start, (int, float)) and start >= 0)
    if node.target in _ALONG:
        given, shape = argument(node, "dim"), value_of(node.args[0]).shape
        dims = [given] if isinstance(given, int) else given or range(len(shape))
        return any(same_size(shape[dim], length) for dim in dims)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    by_a_size = pointwise and any(
        isinstance(value_of(each), (torch.SymInt, torch.SymFloat)) for each in node.all_input_nodes
    )
    return node.target in _AROUND or by_a_size
