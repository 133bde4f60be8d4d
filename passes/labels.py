"""Labels of a loss, and the places that a head reads, as each batch is asked them: as an input, or by a small graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from packc.passes.asks import IgnoredLabels
from packc.passes.axes import same_size, value_of
from packc.passes.crossings import moved
from packc.passes.graph import Graph, module_of
from packc.passes.reasons import NotPackable
from packc.passes.sources import is_parameter

aten = torch.ops.aten

_MAX_OPS = 64
_RESHAPES = {aten.reshape.default}
_FLATTENS = {aten.view.default, aten.flatten.using_ints, aten.contiguous.default}


@dataclass(frozen=True)
class Labels:
    """Labels of a loss and the label it ignores."""

    graph: fx.GraphModule
    """The padded graph's inputs (and, of a further sequence, None for what those before it take) -> its labels, shifted
    as the loss reads them, B*L elements in row-major order."""
    ignore_index: int
    moved: bool = False
    """Whether they are other tokens' labels, the next ones'."""
    input: int | None = None
    """Of which input (B, L) they are the values ``ahead`` positions on, with ignored ones behind a row's last: such
    labels need no op. None: of none."""
    ahead: int = 0


def labels_of_losses(graph: Graph, asks: Iterable[tuple[fx.Node, IgnoredLabels]]) -> list[Labels]:
    """Those of each packed loss, once.

    Raises:
        NotPackable: the model computes them.
    """
    return [_labels(graph, ask) for ask in dict.fromkeys(ask for _, ask in asks)]


def read_places(graph: Graph) -> list[Labels]:
    """What heads read, as labels that are not 0.

    Raises:
        NotPackable: the model computes where that is.
    """
    if not graph.padding:
        return []
    return [Labels(_graph_of(graph, places, "what a head reads"), 0) for places in graph.forms.live]


def _labels(graph: Graph, ask: IgnoredLabels) -> Labels:
    of = _graph_of(graph, ask.labels, "the labels of the loss")
    source, ahead = _moved(_same_elements(ask.labels), ask.ignore_index)
    shape, rows = value_of(source).shape, value_of(graph.mask).shape
    whole = source.op == "placeholder" and len(shape) == 2 and all(map(same_size, shape, rows[:2]))
    number = graph.placeholders.index(source) if whole else None
    return Labels(of, ask.ignore_index, moved(graph, ask.labels), number, ahead)


def _moved(labels: fx.Node, ignored: int) -> tuple[fx.Node, int]:
    """``x`` and ``n``, if labels are ``cat([x[:, n:], ignored], 1)`` or ``pad(x, (0, n), value=ignored)[:, n:]``;
    otherwise themselves, and 0."""
    args: Any = labels.args
    if labels.target is aten.cat.default and len(args[0]) == 2 and args[1:] == (1,):
        kept, filler = args[0]
        x, n = _cut(_same_elements(kept))
        same_rows = n and same_size(value_of(kept).shape[0], value_of(x).shape[0])
        if same_rows and filler.target is aten.new_full.default and filler.args[2] == ignored:
            return x, n
    padded, n = _cut(labels)
    if n and padded.target is aten.pad.default and padded.args[1:] == ([0, n], "constant", ignored):
        return padded.args[0], n  # type: ignore[return-value]
    return labels, 0


def _cut(node: fx.Node) -> tuple[fx.Node, int]:
    """``x`` and ``n`` of ``x[:, n:]``; the node itself and 0, if it is anything else."""
    args: Any = node.args
    if node.target is aten.slice.Tensor and len(args) > 2 and args[1] in (1, -1) and isinstance(args[2], int):
        whole, part = value_of(args[0]).shape, value_of(node).shape
        if args[2] > 0 and len(whole) == 2 and same_size(whole[1] - args[2], part[1]):
            return args[0], args[2]
    return node, 0


def _graph_of(graph: Graph, labels: fx.Node, what: str) -> fx.GraphModule:
    labels, needed = _same_elements(labels), set()
    queue = [labels]
    while queue:
        node = queue.pop()
        if node in needed:
            continue
        needed.add(node)
        queue.extend(map(_same_elements, node.all_input_nodes) if node.target in _RESHAPES else node.all_input_nodes)
        if is_parameter(node) or node in graph.forms.packed_only or len(needed) > _MAX_OPS:
            raise NotPackable(f"{what} ({labels.name}) is computed by the model")
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            of = _same_elements if node.target in _RESHAPES else (lambda each: each)
            copies[node] = result.node_copy(node, lambda each, of=of: copies[of(each)])  # type: ignore[misc]
    result.output(copies[labels])
    return module_of(graph.gm, result)


def _same_elements(node: fx.Node) -> fx.Node:
    """What has the elements of a value in the same order: each batch is asked them, and every op counts."""
    while node.target in _RESHAPES | _FLATTENS:
        node = node.all_input_nodes[0]
    return node
