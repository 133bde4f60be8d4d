"""Several ops as one node, whose target is a graph of its own: passes follow what it means as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


class Outlined:
    """Target of a node; called on the arguments of its graph, in their order, it gives the graph's result."""

    name: str
    """For people."""

    def __init__(self, body: fx.Graph) -> None:
        self.body = body
        self.__name__ = type(self).__name__

    def __call__(self, *args: Any) -> Any:
        return fx.GraphModule(torch.nn.Module(), self.body)(*args)

    def __str__(self) -> str:
        return self.name


def ops_of(node: fx.Node) -> Iterable[fx.Node]:
    """The node itself, or those inside it."""
    return node.target.body.nodes if isinstance(node.target, Outlined) else [node]


def is_random(node: fx.Node) -> bool:
    targets = [each.target for each in ops_of(node)]
    overloads = [each for each in targets if isinstance(each, torch._ops.OpOverload)]
    return any(torch.Tag.nondeterministic_seeded in each.tags for each in overloads)
