"""Layout propagation: which axes of each value are batch and sequence, and how each op reads on tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from packc.passes.axes import BATCH, OTHER, SEQ, covers_tokens, is_tensor, made_equal, same_size, value_of
from packc.passes.graph import Graph, Tokens, is_item
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules import rule_for
from packc.passes.rules.registry import Op
from packc.passes.sequences import sequence_of
from packc.passes.sources import is_argument


def layout(graph: Graph) -> Graph:
    """Propagate layouts from the inputs of the mask's sequence (:mod:`packc.passes.sequences`).

    Raises:
        NotPackable: the mask's sequence meets another.
    """
    inputs = inputs_of_size(graph)
    members = sequence_of(graph, inputs, _follow(graph, inputs))
    return replace(graph, tokens=_follow(graph, members))


def inputs_of_size(graph: Graph) -> list[fx.Node]:
    """The arguments whose first two axes have the mask's sizes.

    One that means something else by them is no danger: a layout only claims that the axes have these sizes, and a rule
    that finds them where it wants features says so. Of symbolic sizes it is guarded: the rows of ids and mask have two
    symbols, unless the model makes them meet. Not so in a graph that packs for documents alone, as few ever will.
    """
    equal = made_equal if graph.padding else same_size
    return [
        node
        for node in graph.placeholders
        if is_argument(node) and value_of(node).ndim >= 2 and all(map(equal, value_of(node).shape[:2], graph.sizes))
    ]


def _follow(graph: Graph, inputs: Iterable[fx.Node]) -> Tokens:
    """Batch and sequence, from ``inputs`` through the graph."""
    tokens = begin(graph, inputs)
    for node in graph.gm.graph.nodes:
        label(node, tokens, *graph.sizes)
    return tokens


def begin(graph: Graph, inputs: Iterable[fx.Node]) -> Tokens:
    """Of the inputs alone; :func:`label` goes on, node by node."""
    layouts = {node: (BATCH, SEQ) + (OTHER,) * (value_of(node).ndim - 2) for node in inputs}
    return Tokens(layouts, padding=graph.padding)


def label(node: fx.Node, tokens: Tokens, batch: Any, length: Any) -> None:
    """Add to ``tokens`` what a node makes of its operands."""
    if node.op != "call_function":
        return
    if is_item(node):
        source, item = node.args
        of_source = tokens.kinds.get(source)  # type: ignore[arg-type]
        if isinstance(of_source, list):
            tokens.kinds[node] = of_source[item]  # type: ignore[index]
        return
    if node.target is torch.ops.aten.sym_size.int:
        return
    if not any(covers_tokens(tokens.layout(operand)) for operand in node.all_input_nodes if is_tensor(operand)):
        return
    try:
        reading = _reading(node, tokens, batch, length)
    except NotTokenwise as reason:
        tokens.refusals[node] = str(reason)
        return
    tokens.readings[node] = reading
    tokens.kinds[node] = reading.results


def _reading(node: fx.Node, tokens: Tokens, batch: Any, length: Any) -> Reading:
    rule = rule_for(node.target)
    if rule is None:
        raise NotTokenwise(f"no rule for {node.target}")
    reading = rule(Op(node, tokens, batch, length))
    if isinstance(reading.results, tuple):
        shape = value_of(node).shape
        assert len(reading.results) == len(shape), f"{node.target}: {reading.results} for {tuple(shape)}"
    return reading
