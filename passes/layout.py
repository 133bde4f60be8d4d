"""Layout propagation: which axes of each value are batch and sequence, and how each op reads on packed values.

Annotates nodes and changes nothing: ``meta["layout"]`` is the layout of a value with token axes (a list of them for an
op with several results), ``meta["packed_form"]`` how the op is written on packed operands, ``meta["unpacked_because"]``
why it has no packed form although an operand has token axes.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from packc.passes.axes import BATCH, OTHER, SEQ, covers_tokens, is_tensor, same_size, value_of
from packc.passes.rules import NotTokenwise, PackedForm, rule_for
from packc.passes.rules.registry import Op
from packc.passes.sources import is_argument


def layout(gm: fx.GraphModule, *, mask: fx.Node) -> fx.GraphModule:
    """Propagate layouts from the arguments that have the mask's ``(B, L)`` as their first two axes.

    An argument of that shape which means something else is no danger: a layout only claims that the axes have these
    sizes, and a rule that finds them where it wants features says so.
    """
    batch, length = mask.meta["val"].shape
    layouts: dict[fx.Node, object] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _label_input(node, batch, length, layouts)
        elif node.op == "call_function":
            _label_call(node, layouts, batch, length)
    for node, found in layouts.items():
        node.meta["layout"] = found
    return gm


def _label_input(node: fx.Node, batch: Any, length: Any, layouts: dict) -> None:
    if not is_argument(node):
        return
    value = node.meta["val"]
    if value.ndim >= 2 and same_size(value.shape[0], batch) and same_size(value.shape[1], length):
        layouts[node] = (BATCH, SEQ) + (OTHER,) * (value.ndim - 2)


def _label_call(node: fx.Node, layouts: dict, batch: Any, length: Any) -> None:
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
        node.meta["unpacked_because"] = str(reason)
        return
    node.meta["packed_form"] = form
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
