"""Layout propagation: which axes of each value are batch and sequence, and how each op reads on packed values."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from packc.passes.axes import BATCH, OTHER, SEQ, covers_tokens, is_tensor, same_size, value_of
from packc.passes.rules import NotTokenwise, PackedForm, rule_for
from packc.passes.rules.registry import Op
from packc.passes.sequences import sequence_of
from packc.passes.sources import is_argument


@dataclass
class Propagated:
    """What becomes of token axes on their way through a graph."""

    layouts: dict[fx.Node, Any] = field(default_factory=dict)
    """The layout of a value with token axes; a list of them for an op with several results."""
    forms: dict[fx.Node, PackedForm] = field(default_factory=dict)
    """How an op is written on packed operands."""
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    """Why an op has no packed form although an operand has token axes."""


def layout(gm: fx.GraphModule, *, mask: fx.Node) -> fx.GraphModule:
    """Propagate layouts from the inputs of the mask's sequence (:mod:`packc.passes.sequences`).

    Annotates nodes and changes nothing: ``meta["layout"]``, ``meta["packed_form"]`` and ``meta["unpacked_because"]``
    are the three entries of :class:`Propagated`.

    Raises:
        NotPackable: the mask's sequence meets another.
    """
    inputs = _inputs_of_size(gm, mask)
    members = sequence_of(mask, inputs, _propagate(gm, mask, inputs), gm)
    found = _propagate(gm, mask, members)
    for node in gm.graph.nodes:
        for key, entries in (
            ("layout", found.layouts),
            ("packed_form", found.forms),
            ("unpacked_because", found.refusals),
        ):
            node.meta.pop(key, None)
            if node in entries:
                node.meta[key] = entries[node]
    return gm


def _inputs_of_size(gm: fx.GraphModule, mask: fx.Node) -> list[fx.Node]:
    """The arguments whose first two axes have the mask's sizes.

    One that means something else by them is no danger: a layout only claims that the axes have these sizes, and a rule
    that finds them where it wants features says so.
    """
    batch, length = mask.meta["val"].shape
    return [
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if is_argument(node)
        and node.meta["val"].ndim >= 2
        and same_size(node.meta["val"].shape[0], batch)
        and same_size(node.meta["val"].shape[1], length)
    ]


def _propagate(gm: fx.GraphModule, mask: fx.Node, inputs: Iterable[fx.Node]) -> Propagated:
    """Follow batch and sequence from ``inputs`` through the graph."""
    sizes = mask.meta["val"].shape
    found = Propagated()
    for node in inputs:
        found.layouts[node] = (BATCH, SEQ) + (OTHER,) * (node.meta["val"].ndim - 2)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            _label_call(node, found, *sizes)
    return found


def _label_call(node: fx.Node, found: Propagated, batch: Any, length: Any) -> None:
    layouts = found.layouts
    if node.target is operator.getitem:
        source, item = cast("tuple[fx.Node, int]", node.args)
        parent = layouts.get(source)
        if isinstance(parent, list) and covers_tokens(parent[item]):
            layouts[node] = parent[item]
        return
    if node.target is torch.ops.aten.sym_size.int:
        return
    if not any(covers_tokens(layouts.get(operand)) for operand in node.all_input_nodes if is_tensor(operand)):
        return
    try:
        form = _packed_form(node, layouts, batch, length)
    except NotTokenwise as reason:
        found.refusals[node] = str(reason)
        return
    found.forms[node] = form
    if form.layouts is not None:
        layouts[node] = form.layouts


def _packed_form(node: fx.Node, layouts: dict, batch: object, length: object) -> PackedForm:
    rule = rule_for(node.target)
    if rule is None:
        raise NotTokenwise(f"no rule for {node.target}")
    form = rule(Op(node, layouts, batch, length))
    results = value_of(node)
    single = form.layouts if isinstance(form.layouts, tuple) else None
    assert single is None or len(single) == results.ndim, f"{node.target}: {single} for {tuple(results.shape)}"
    return form
