"""Short causal convolutions that a model writes with ``conv1d`` become packc's, which are told where documents begin.

A convolution of every channel on its own is causal when its padding of ``width - 1`` lies before the first token alone:

    conv1d(x, weight, padding=width - 1, groups=channels)[..., :length]
    conv1d(pad(x, (width - 1, 0)), weight, groups=channels)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from packc.passes.arguments import arguments_of
from packc.passes.axes import same_size, value_of
from packc.passes.graph import Graph, call_like

aten = torch.ops.aten
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_ZEROS = ([0], ["constant", None], ["constant", 0])
_SAME = {aten.alias.default, aten.contiguous.default}


def causal_convs(graph: Graph) -> Graph:
    """Replace every such convolution; no-op elsewhere."""
    gm = graph.gm
    for node in gm.graph.find_nodes(op="call_function", target=aten.conv1d.default):
        x, weight, bias, stride, padding, dilation, groups = _arguments(node)
        channels, width = value_of(x).shape[-2], value_of(weight).shape[-1]
        if value_of(x).ndim != 3 or stride != [1] or dilation != [1] or not isinstance(width, int):
            continue
        if not same_size(groups, channels) or not same_size(value_of(weight).shape[0], channels):
            continue
        if padding == [0]:
            x, results = _unpadded(x, width), [node]
        else:
            results = list(_first(node, value_of(x).shape[2])) if padding == [width - 1] else []
        if x is None or not results:
            continue
        with gm.graph.inserting_before(node):
            replacement = _causal(gm.graph, node, x, weight, bias)
        for each in results:
            each.replace_all_uses_with(replacement)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return graph


def _arguments(node: fx.Node) -> list[Any]:
    return [list(each) if isinstance(each, (list, tuple)) else each for each in arguments_of(node).values()]


def _unpadded(x: fx.Node, width: int) -> fx.Node | None:
    """What was padded by ``width - 1`` zeros in front."""
    if width == 1:
        return x
    if x.target not in _PADS:
        return None
    inner, pads, *with_zeros = _arguments(x)
    return inner if pads == [width - 1, 0] and with_zeros in _ZEROS else None


def _first(node: fx.Node, length: Any) -> Iterator[fx.Node]:
    """The slices of the first ``length`` positions, if nothing else is read of a value."""
    found: list[fx.Node] = []
    for user in node.users:
        whole, part = value_of(node).shape, value_of(user)
        if user.target in _SAME or (user.target is aten.slice.Tensor and all(map(same_size, part.shape, whole))):
            inner = list(_first(user, length))
            if not inner:
                return
            found += inner
        elif user.target is aten.slice.Tensor and _takes_first(user, length):
            found.append(user)
        else:
            return
    yield from found


def _takes_first(node: fx.Node, length: Any) -> bool:
    _, dim, start, _, step = _arguments(node)
    return dim in (2, -1) and start in (None, 0) and step == 1 and same_size(value_of(node).shape[2], length)


def _causal(graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """In the dtype of the convolution, which under autocast is not that of its operands."""

    def call(target: Any, *args: Any) -> fx.Node:
        return call_like(graph, node, target, args)

    dtype = value_of(node).dtype
    operands = [
        each if each is None or value_of(each).dtype == dtype else call(aten.to.dtype, each, dtype)
        for each in (x, weight, bias)
    ]
    tokens, taps = call(aten.transpose.int, operands[0], 1, 2), call(aten.squeeze.dim, operands[1], 1)
    both = call(torch.ops.packc.causal_conv1d.default, tokens, taps, operands[2], None, None, None, False)
    return call(aten.transpose.int, call(operator.getitem, both, 0), 1, 2)
