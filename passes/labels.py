"""The labels of a packed loss, as a small graph of their own: a batch is asked whether padding carries a live one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from packc.passes.forms import Forms, packed_form
from packc.passes.reasons import NotPackable

_MAX_OPS = 64


@dataclass(frozen=True)
class IgnoredLabels:
    """Labels of a loss and the label it ignores."""

    graph: fx.GraphModule
    """The padded graph's inputs -> its labels, shifted as the loss reads them, B*L elements in row-major order."""
    ignore_index: int


def ignored_labels(gm: fx.GraphModule, forms: Forms) -> list[IgnoredLabels]:
    """One entry for each packed loss of the graph.

    Raises:
        NotPackable: the labels depend on what the model computes, so they are not known before it runs.
    """
    found: dict[tuple[fx.Node, int], IgnoredLabels] = {}
    for node in gm.graph.nodes:
        form = packed_form(node)
        if form is None or form.ignored_at_padding is None or node not in forms.packed:
            continue
        labels, ignore_index = form.ignored_at_padding
        if form.ignored_at_padding not in found:
            found[form.ignored_at_padding] = IgnoredLabels(_graph_of(gm, labels, forms), ignore_index)
    return list(found.values())


def _graph_of(gm: fx.GraphModule, labels: fx.Node, forms: Forms) -> fx.GraphModule:
    needed, queue = set(), [labels]
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        queue.extend(node.all_input_nodes)
        weight = isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        if weight or node in forms.packed_only or len(needed) > _MAX_OPS:
            raise NotPackable(f"the labels of the loss ({labels.name}) are computed by the model")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[labels])
    return fx.GraphModule(gm, graph)
