"""What is made of a mask alone, tried: of a mask of ones, and of one of zeros.

Models write the opposite of a mask in a dozen ways, ``1 - mask``, ``mask < 1``, ``mask ^ 1``; what it is at tokens and
at padding does not change with them.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from packc.passes.axes import value_of
from packc.passes.graph import Graph
from packc.passes.mask_graphs import computed, is_number, shape_of

_LARGEST = 2**20
"""Elements of a value that is tried."""


class Opposites:
    """The values made of a mask alone that are zero, or true, at tokens and nowhere else."""

    def __init__(self, graph: Graph, mask: fx.Node) -> None:
        self.zero: set[fx.Node] = set()
        self.true: set[fx.Node] = set()
        of_ones, of_zeros = ({mask: make(shape_of(value_of(mask), {}))} for make in (torch.ones, torch.zeros))
        for node in graph.gm.graph.nodes:
            ones, zeros = (_tried(node, mask, of) for of in (of_ones, of_zeros))
            if not isinstance(ones, Tensor) or not isinstance(zeros, Tensor):
                continue
            if not ones.any() and bool(zeros.bool().all()):
                self.zero.add(node)
            if bool(ones.bool().all()) and not zeros.any():
                self.true.add(node)


def _tried(node: fx.Node, mask: fx.Node, of: dict[fx.Node, Any]) -> Any:
    """A value where the mask is the one in ``of``, to which it is added; None if it is made of something else."""
    value = value_of(node)
    try:
        if node is mask:
            of[node] = of[node].to(value.dtype)
        elif is_number(value) or (
            isinstance(value, Tensor)
            and node.op == "call_function"
            and not node.is_impure()
            and all(each in of for each in node.all_input_nodes)
            and prod(shape_of(value, {})) <= _LARGEST
        ):
            of[node] = computed(node, of, {})
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    return of.get(node)
