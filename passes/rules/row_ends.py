"""Ends of rows, ``x[:, -k:]``, that a graph returns as they are: what a cache keeps of them for the next call.

A convolution keeps its last inputs, attention with a window its last keys and values. The next call masks padded keys,
but not inputs of a convolution: where those of padding are not zero, stock's are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from packc.passes.axes import BATCH, SEQ, Layout, same_size, value_of
from packc.passes.rules.registry import first_is_zero, zero_rule_for

aten = torch.ops.aten

_COPIES = {aten.clone.default, aten.alias.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default}

LayoutOf = Callable[[Any], Layout | None]


def is_kept_end(node: fx.Node, layout_of: LayoutOf) -> bool:
    """Whether a node takes the end of every row, of which nothing but copies is made and returned."""
    return end_taken(node, layout_of) is not None and _is_only_returned(node)


def kept_end_of(value: fx.Node, layout_of: LayoutOf) -> fx.Node | None:
    """A value with the same entries, rearranged, whose end is kept; None if there is none."""
    while True:
        for each in _transposed(value):
            if any(is_kept_end(user, layout_of) for user in each.users if user.args[:1] == (each,)):
                return each
        if zero_rule_for(value.target) is not first_is_zero or not isinstance(value.args[0], fx.Node):
            return None
        value = value.args[0]


def _transposed(value: fx.Node) -> Iterator[fx.Node]:
    """The value, and what it is transposed to elsewhere."""
    yield value
    for user in value.users:
        if user.target in _COPIES or user.target is aten.transpose.int:
            yield from _transposed(user)


def end_taken(node: fx.Node, layout_of: LayoutOf) -> int | None:
    """How many of the last positions of every row a node takes; None if it does something else."""
    if node.target is not aten.slice.Tensor or len(node.args) < 3 or node.kwargs:
        return None
    source, dim, start, *rest = node.args
    layout = layout_of(source)
    to_the_end = not rest or rest[0] == torch.iinfo(torch.int64).max
    if not isinstance(dim, int) or not isinstance(start, int) or layout is None or BATCH not in layout:
        return None
    taken = to_the_end and layout[dim] is SEQ and same_size(value_of(node).shape[dim], -start)
    return -start if taken else None


def _is_only_returned(node: fx.Node) -> bool:
    return all(user.op == "output" or (user.target in _COPIES and _is_only_returned(user)) for user in node.users)
