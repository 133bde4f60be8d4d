"""An op's arguments by their names in its schema, wherever a caller wrote them, or the default where nobody did."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All, in order; none of what is no op."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = node.target._schema.arguments
    given = dict(zip((each.name for each in schema), node.args))  # noqa: B905  the rest is named, or left out
    return {each.name: given.get(each.name, node.kwargs.get(each.name, each.default_value)) for each in schema}


def argument(node: fx.Node, name: str) -> Any:
    """
    Raises:
        KeyError: the op has none of this name.
    """
    return arguments_of(node)[name]
