"""The part of a graph that makes an attention mask, run by itself: for other padding, and at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from packc.passes.axes import covers_tokens, hint_of, is_tensor, value_of
from packc.passes.graph import Graph
from packc.passes.sources import argument_path, is_parameter

_POSITIONS = "position_ids"
_MOST_NODES = 500
"""Of what makes a mask; one of more is computed by the model."""
_LARGEST_CONSTANT = 2**31
"""From here on a number says "to the end"."""

Sizes = dict[Any, int]
"""Symbol -> its value; empty for those of the example."""
Fill = Callable[[list[int], torch.dtype, int], Tensor]
"""``(shape, dtype, which of the inputs)`` -> values to try."""


@dataclass
class MaskGraph:
    nodes: list[fx.Node]
    """In order; the last is the attention mask."""
    padding: fx.Node | None
    """The padding mask (B, L), if there is one."""
    positions: list[fx.Node]
    """Inputs that say which position in its document a token has, (B, L) or (1, L)."""
    others: list[fx.Node]
    """Further inputs, and what the model computes of tokens: biases may be made of it."""

    def run(self, padding: Tensor, positions: Tensor, fill: Fill, at: Sizes) -> Tensor:
        """The attention mask of this padding mask and of these positions, both (B, L), every other input made by
        ``fill``.

        Raises:
            IndexError, RuntimeError, TypeError, ValueError: it cannot be computed here.
        """
        values: dict[fx.Node, Any] = {}
        if self.padding is not None:
            values[self.padding] = padding.to(value_of(self.padding).dtype)
        for each in self.positions:
            values[each] = positions[: shape_of(value_of(each), at)[0]].to(value_of(each).dtype)
        for which, other in enumerate(self.others):
            value = value_of(other)
            values[other] = fill(shape_of(value, at), value.dtype, which)
        for node in self.nodes:
            if node not in values:
                values[node] = computed(node, values, at)
        return values[self.nodes[-1]]

    def behind(self, value: fx.Node) -> MaskGraph | None:
        """The part that makes the mask of one of its values; None if others are read beside that."""
        needed, queue = set[fx.Node](), [self.nodes[-1]]
        while queue:
            node = queue.pop()
            if node not in needed:
                needed.add(node)
                queue.extend([] if node is value or is_number(value_of(node)) else node.all_input_nodes)
        if value not in needed or not needed.isdisjoint(each for each in self.others if each is not value):
            return None
        return replace(self, nodes=[node for node in self.nodes if node in needed], others=[value])

    def constants(self) -> set[int]:
        """Every whole number that it is made from, as long as a window or a table may be."""
        found: set[int] = set()

        def note(argument: Any) -> Any:
            if isinstance(argument, int) and abs(argument) < _LARGEST_CONSTANT:
                found.add(abs(argument))
            return argument

        for node in self.nodes:
            fx.node.map_aggregate((node.args, node.kwargs), note)
            note(value_of(node))
            if node.op == "get_attr":
                found.update(shape_of(value_of(node), {}))
                value = _attribute(node)
                if value.numel() == 1 and not value.is_floating_point():
                    note(int(value))
        return found

    def numbers(self) -> set[float]:
        """Every number that values are computed with, and may be compared with."""
        found: set[float] = set()
        for node in self.nodes:
            for each, given in zip(_schema(node), node.args):  # noqa: B905  the rest is named, or left out
                number = value_of(given) if isinstance(given, fx.Node) else given
                if isinstance(number, (int, float)) and str(each.type) in ("number", "Tensor"):
                    found.add(number)
        return found


def made_from(graph: Graph, value: fx.Node, begins: set[fx.Node] | None = None) -> MaskGraph | None:
    """What makes a value of inputs and of what the model computes of tokens; None if that cannot be run by itself.

    ``begins``: what of the latter to begin with.
    """
    needed, queue = set[fx.Node](), [value]
    of_tokens = _computed_of_tokens(graph) if begins is None else begins
    while queue:
        if len(needed) > _MOST_NODES:
            return None
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        if is_number(value_of(node)):
            continue  # a size is known without what has it
        if node in of_tokens:
            continue
        constant = node.op in ("placeholder", "get_attr") and isinstance(value_of(node), Tensor)
        if not constant and (node.op != "call_function" or node.is_impure()):
            return None
        queue.extend(node.all_input_nodes)
    nodes = [node for node in graph.gm.graph.nodes if node in needed]
    _fix_numbers(graph, nodes)
    given = [node for node in nodes if node.op == "placeholder" or node in of_tokens]
    inputs = [node for node in given if isinstance(value_of(node), Tensor)]
    padding = graph.mask if graph.padding else None
    positions = [
        node for node in inputs if argument_path(node).split(".")[-1] == _POSITIONS and value_of(node).ndim == 2
    ]
    return MaskGraph(nodes, padding, positions, [node for node in inputs if node not in (padding, *positions)])


def _fix_numbers(graph: Graph, nodes: list[fx.Node]) -> None:
    """Guard numbers among the inputs that are no sizes, a window's say: what a mask shows is found for these."""
    sizes = set().union(
        *(
            size.node.expr.free_symbols
            for node in graph.placeholders
            if is_tensor(node)
            for size in value_of(node).shape
            if isinstance(size, torch.SymInt)
        )
    )
    for node in nodes:
        value = value_of(node)
        is_symbol = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        if is_symbol and hint_of(value) is not None and not value.node.expr.free_symbols <= sizes:
            node.meta["val"] = value.node.pytype(value)


def _computed_of_tokens(graph: Graph) -> set[fx.Node]:
    """Numbers of each token in which a weight meets the tokens."""
    weights, met = set[fx.Node](), set[fx.Node]()
    for node in graph.gm.graph.nodes:
        of_weights = is_parameter(node) or not weights.isdisjoint(node.all_input_nodes)
        if of_weights and node not in graph.tokens.readings:
            weights.add(node)
        elif of_weights and is_tensor(node) and value_of(node).is_floating_point():
            met.add(node)
    return {node for node in met if covers_tokens(graph.tokens.layout(node))}


def shape_of(value: Tensor, at: Sizes) -> list[int]:
    """
    Raises:
        ValueError: nobody knows it before the graph runs.
    """
    return [int(number(size, at)) for size in value.shape]


def number(value: Any, at: Sizes) -> int | float | bool:
    """A size, or what is computed of sizes, for these values of symbols; others as the example has them."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    expression = value.node.expr
    if at and not expression.free_symbols.isdisjoint(at):
        expression = expression.subs(at)
        if expression.free_symbols:
            raise ValueError(f"{value} is not known at {at}")
        kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
        return kind(expression)
    hint = hint_of(value)
    if hint is None:
        raise ValueError(f"{value} is not known before the graph runs")
    return hint


def is_number(value: Any) -> bool:
    """Whether it is a size, or computed of sizes."""
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def computed(node: fx.Node, values: dict[fx.Node, Any], at: Sizes) -> Any:
    """What a node is of these values of its operands; ``at``: as for :func:`number`."""
    if node.op == "get_attr":
        return _attribute(node).cpu()
    if is_number(value_of(node)):
        return number(value_of(node), at)
    # On the CPU, where an index out of range is an error and not the end of the process.
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda x: values[x] if isinstance(x, fx.Node) else torch.device("cpu") if isinstance(x, torch.device) else x,
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _schema(node: fx.Node) -> list[Any]:
    return node.target._schema.arguments if isinstance(node.target, OpOverload) else []


def _attribute(node: fx.Node) -> Tensor:
    return getattr(node.graph.owning_module, str(node.target))
