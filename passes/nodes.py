"""Nodes that passes put into a padded graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from packc.passes.axes import value_of


def call(gm: fx.GraphModule, target: Any, args: tuple, kwargs: Any = None, *, like: fx.Node) -> fx.Node:
    """A call where the graph is inserting, with its fake value, and the rest of what is known of ``like``."""
    node = gm.graph.call_function(target, args, kwargs or {})
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    values = fx.map_arg((args, kwargs or {}), value_of)
    node.meta["val"] = target(*values[0], **values[1])
    return node
